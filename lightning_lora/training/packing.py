"""Packed weights during a fit."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule, Trainer

from lightning_lora.errors import LoRAWarning
from lightning_lora.model.packing import has_packed, set_packing
from lightning_lora.model.view import View


@contextmanager
def packing(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Keep packed copies inside this context, if ``pack_base`` is True.

    Warns:
        LoRAWarning: in training, there was nothing to pack.
    """
    view = View(pl_module)
    asked = view.config.pack_base
    set_packing(view, asked)
    try:
        yield
    finally:
        view = View(pl_module)
        if asked and trainer.global_step and not has_packed(view):
            warnings.warn(
                "pack_base=True had no effect: no layer could use packed weights. They are for a CPU: linear layers in "
                "bfloat16 (only on processors without AMX) or float32 (only on AMD's processors) with at least 16 rows "
                "in a batch and without DoRA, and nn.Conv2d in float32 with images in torch.channels_last. Leave "
                "pack_base out.",
                LoRAWarning,
                stacklevel=2,
            )
        set_packing(view, allowed=False)

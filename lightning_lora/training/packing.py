"""Packed weights during a fit."""

import warnings

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import LoRAWarning
from lightning_lora.functional.products import has_onednn, packing_wins
from lightning_lora.model.packing import packed_layers, set_packing
from lightning_lora.model.view import View


class Packing:
    """Packed copies of frozen weights while a module trains.

    There are none unless ``pack_base`` is True.
    """

    def __init__(self, pl_module: LightningModule) -> None:
        self._module = pl_module
        view = View(pl_module)
        self._is_new = view.config.pack_base
        set_packing(view, allowed=view.config.pack_base)

    def report(self) -> None:
        """Say how many layers were packed.

        Called before each step of an optimizer, it says so once.

        Warns:
            LoRAWarning: there was nothing to pack.
        """
        if not self._is_new:
            return
        self._is_new = False
        view = View(self._module)
        packed = packed_layers(view)
        if not packed:
            warnings.warn(_nothing_packed(self._module.device), LoRAWarning, stacklevel=1)
            return
        megabytes = sum(copies.nbytes for copies in packed) / 1e6
        rank_zero_info(
            f"LoRACallback packed the weights of {len(packed)} of {len(view.layers)} adapted layers: "
            f"{megabytes:,.1f} MB of copies."
        )

    def close(self) -> None:
        """Drop the copies."""
        set_packing(View(self._module), allowed=False)


def _nothing_packed(device: torch.device) -> str:
    found = "pack_base=True has no effect: no adapted layer uses packed weights."
    if device.type != "cpu":
        return f"{found} They are for a CPU, and the model is on {device}. Leave pack_base out."
    if not has_onednn(torch.float32):
        return f"{found} They need oneDNN, which this torch does not have or does not use. Leave pack_base out."
    kinds = ["nn.Conv2d in float32, if the images are in torch.channels_last"]
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        if has_onednn(dtype) and packing_wins(dtype):
            kinds.append(f"linear layers in {name}")
    return (
        f"{found} On this processor, these can: {'; '.join(kinds)}. Not those with DoRA, in a compiled or sharded "
        "model, or with fewer than 16 rows (all tokens of a batch together). Leave pack_base out if you have no such "
        "layers."
    )

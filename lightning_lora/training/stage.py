"""What a stage of a Trainer found when it began, and how far it has come."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule

from lightning_lora.config import LoRAConfig
from lightning_lora.model.inject import inject_adapters
from lightning_lora.model.originals import keep_originals
from lightning_lora.model.remember import view_of
from lightning_lora.training.averaging import copy_adapted


@dataclass
class Stage:
    """One stage: a fit, a validation, a test or a prediction.

    Args:
        config: What the module is adapted with.
        was_adapted: Whether the module had adapters on its layers before.
        was_merged: Whether it was merged before, so that the stage took the updates out of its weights.
        base_is_open: Whether nothing was trained yet, so that what the module's hooks load is the base.
        states_are_read: Whether another callback reads whole checkpoints, and so perhaps whole states of the model.
        base_is_noted: Whether the base's fingerprint was taken in this stage.
        has_loaded: Whether adapters were loaded from a checkpoint.
        has_begun: Whether training has begun.
        is_over: Whether the stage has ended.
        random: The states of random number generators that a checkpoint held.
    """

    config: LoRAConfig
    was_adapted: bool = False
    was_merged: bool = False
    base_is_open: bool = False
    states_are_read: bool = False
    base_is_noted: bool = False
    has_loaded: bool = False
    has_begun: bool = False
    is_over: bool = False
    random: Any = None

    def adapt(self, pl_module: LightningModule) -> None:
        """Adapt what the module's own hooks have made; what they loaded until now is the base."""
        inject_adapters(pl_module, self.config)
        copy_adapted(callbacks_of(pl_module), pl_module)
        if self.base_is_open:
            view = view_of(pl_module)
            view.record.originals = {}
            keep_originals(view)
            self.base_is_open = False


def callbacks_of(pl_module: LightningModule) -> list[Callback]:
    """Return the callbacks of the module's Trainer."""
    return pl_module.trainer.callbacks  # type: ignore[attr-defined,no-any-return]  # Lightning sets it outside the class

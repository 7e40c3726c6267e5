"""Dropout of adapters in training steps.

It acts whatever mode the frozen layers are in. A model from ``from_pretrained`` is in eval mode, and Lightning keeps it
so in a fit. The modes do not change.
"""

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View


class Dropout:
    """Lets dropout act in the training steps of a fit."""

    def __init__(self) -> None:
        self._layers: list[LoRALayer] | None = None

    def begin_step(self, model: nn.Module) -> None:
        """Let it act in ``model``.

        It ends with the step, or where ``eval()`` is called.
        """
        if self._layers is None:
            self._layers = [layer for layer in View(model).layers.values() if layer.lora_settings.dropout]
        for layer in self._layers:
            layer.lora_step.runs = True

    def end_step(self) -> None:
        """End a step.

        Its backward pass, which may compute layers again, is over too.
        """
        for layer in self._layers or ():
            layer.lora_step.runs = False

    def close(self) -> None:
        """End the last step, also one that failed."""
        self.end_step()
        self._layers = None

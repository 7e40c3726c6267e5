"""Dropout, which acts in training steps alone, whatever the modes of the layers."""

from torch import nn

from lightning_lora.layers import Step
from lightning_lora.model.view import View


class StepDropout:
    """Lets dropout act in the training steps of a fit."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._has_begun = False

    def begin_step(self, model: nn.Module) -> None:
        """Let it act in ``model``.

        It ends with the step, or where ``eval()`` is called.
        """
        if not self._has_begun:
            self._has_begun = True
            self._steps = [
                layer.lora_step
                for layer in View(model).layers.values()
                if layer.lora_settings.dropout
            ]
        for step in self._steps:
            step.runs = True

    def end_step(self) -> None:
        """End a step.

        Its backward pass, which may compute layers again, is over too.
        """
        for step in self._steps:
            step.runs = False

    def close(self) -> None:
        """End the last step, also one that failed."""
        self.end_step()
        self._steps = []
        self._has_begun = False

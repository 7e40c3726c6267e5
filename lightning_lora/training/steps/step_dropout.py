"""Dropout, which acts in training steps alone, whatever the modes of the layers."""

from torch import nn

from lightning_lora.layers import Step
from lightning_lora.model.view import View


class StepDropout:
    """Lets dropout act in the training steps of a fit."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._has_begun = False

    def begin_training_step(self, model: nn.Module) -> None:
        """Let dropout act in ``model`` until the step ends, or until ``eval()`` is called."""
        if not self._has_begun:
            self._has_begun = True
            self._steps = [
                layer.lora_step
                for layer in View(model).layers.values()
                if layer.lora_settings.dropout
            ]
        for step in self._steps:
            step.runs = True

    def end_training_step(self) -> None:
        """Let dropout act no more: the backward pass, which may compute layers again, is over too."""
        for step in self._steps:
            step.runs = False

    def close(self) -> None:
        """End the last step, also one that failed, and let go of the layers."""
        self.end_training_step()
        self._steps = []
        self._has_begun = False

"""What tests of several rooms run: callbacks, errors, models."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.storage.state import NOTE
from tests.support.models import WIDTH, WORDS, randomise


class At(L.Callback):
    """Do something at the start of a given training batch."""

    def __init__(self, batch: int, action: Callable[[L.Trainer, L.LightningModule], Any]) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.batch:
            self.action(trainer, pl_module)


class StopError(RuntimeError):
    pass


def stop(*_: Any) -> None:
    raise StopError


def held(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state, without the note to other readers."""
    return {name: value for name, value in checkpoint["state_dict"].items() if name != NOTE}


def tensors(path: Any) -> list[str]:
    """Names in a checkpoint's state."""
    return list(held(torch.load(path, weights_only=True)))


class Three(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, index: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.linear(self.embed(index))))


def three(**kwargs: Any) -> Three:
    model = Three()
    inject_adapters(model, LoRAConfig(r=2, target_modules="all", **kwargs))
    randomise(model, scale=0.3)
    return model

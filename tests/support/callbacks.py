"""Callbacks, loggers and writers beside LoRACallback."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import Logger
from packaging.version import Version
from torch import Tensor

from tests.support.cases import StopError
from tests.support.models import same, state


class Notes(Logger):
    """A logger that keeps what it gets. As in MLflow, no value may change."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []

    def log_hyperparams(self, params: Mapping[str, Any], *_: Any, **__: Any) -> None:
        changed = [key for each in self.seen for key, value in each.items() if params.get(key, value) != value]
        if changed:
            raise ValueError(f"{changed} cannot be changed")
        self.seen.append(dict(params))

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    @property
    def ours(self) -> list[dict[str, Any]]:
        return [each for each in self.seen if "lora/r" in each]


class KeepsStates(L.Callback):
    """Keeps the module's state in each of two processes, before anything is merged."""

    def __init__(self, folder: Path) -> None:
        self.files = [folder / f"{rank}.pt" for rank in range(2)]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.save(state(pl_module), self.files[trainer.global_rank])

    def same(self) -> dict[str, Tensor]:
        """The state, which is the same in both."""
        first, second = (torch.load(file, weights_only=True) for file in self.files)
        assert same(first, second)
        return first


class WritesLater(TorchCheckpointIO):
    """A CheckpointIO that writes all its files when the run is over."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.waiting.append((args, kwargs))

    def teardown(self) -> None:
        for args, kwargs in self.waiting:
            super().save_checkpoint(*args, **kwargs)
        self.waiting = []


class Fails(L.Callback):
    """Fail after the sixth step."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 6:
            raise StopError


ON_EXCEPTION: dict[str, Callable[[Path], L.Callback]] = {"callback": lambda folder: OnExceptionCheckpoint(folder)}
if Version(L.__version__) >= Version("2.6"):
    ON_EXCEPTION["option"] = lambda folder: ModelCheckpoint(
        folder, "on_exception", save_on_exception=True, save_top_k=0
    )

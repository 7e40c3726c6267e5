"""Callbacks, loggers and writers beside LoRACallback."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
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


PLAIN_SWALR = Version(torch.__version__) >= Version("2.6")  # its state could not be loaded safely before


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in states]).mean(0) for name in states[0]}


def moving(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = states[0]
    for each in states[1:]:
        average = {name: 0.9 * value + 0.1 * each[name] for name, value in average.items()}
    return average


# The companion; the average at the end of four epochs of four steps; what validation sees after the first
AVERAGES: dict[str, tuple[Callable[[], L.Callback], Callable[[Any], Any], Callable[[Any], Any]]] = {}
if PLAIN_SWALR:
    AVERAGES["swa"] = (
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=2),
        lambda after: mean(after[3:12:4]),  # as each epoch from the second on begins
        lambda after: after[3],  # it moves to the average when all is over
    )
if hasattr(bundled, "WeightAveraging"):
    AVERAGES["mean"] = (bundled.WeightAveraging, mean, lambda after: mean(after[:4]))
if hasattr(bundled, "EMAWeightAveraging"):
    AVERAGES["ema"] = (lambda: bundled.EMAWeightAveraging(decay=0.9), moving, lambda after: moving(after[:4]))

"""Fits and what they give."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora import inject_adapters, load_adapter
from tests.support.cases import StopError, trained
from tests.support.models import LitTiny, data, lora, same, state, trainer
from tests.support.versions import keeps_random


class Stateful:
    """A loader that knows where it is, which is what Lightning needs to go on in the middle of an epoch."""

    def __init__(self) -> None:
        self.batches, self.at = list(data()), 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        torch.rand(1)  # as the loaders of torch and torchdata draw a seed for their workers
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        self.at %= len(self.batches)
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Steps(L.Callback):
    """Keep what trains after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after.append(trained(pl_module))


def fit(
    folder: Path, *callbacks: L.Callback, model: Any = None, train: Any = None, ckpt_path: Any = None, **options: Any
) -> tuple[Any, L.Trainer]:
    """Fit a module, or one of a class, or a LitTiny, with these callbacks; return it and its Trainer."""
    torch.manual_seed(5 if ckpt_path is None else 6)  # a run that goes on does not find the numbers by chance
    model = (model or LitTiny)() if model is None or isinstance(model, type) else model
    t = trainer(folder, callbacks, **options)
    val = data() if is_overridden("validation_step", model) else None
    t.fit(model, data() if train is None else train, val, ckpt_path=ckpt_path)
    return model, t


def resumes_to_the_bit(
    folder: Path,
    build: Callable[[], Any],
    *make: Callable[[], L.Callback],
    at: str = "epoch=0",
    train: Callable[[], Any] = data,
    saving: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Fit, and again from the first run's file ``at``, to the same bits. Return that module. Each run has a folder."""
    models = build(), build()
    file = folder / "through" / f"{at}.ckpt"
    for model, name, path in zip(models, ("through", "resumed"), (None, file), strict=True):
        saves = ModelCheckpoint(folder / name, f"{{{at.partition('=')[0]}}}", save_top_k=-1, **saving or {})
        callbacks = [each() for each in make]
        fit(folder, *callbacks, saves, model=model, train=train(), ckpt_path=path, **options)
    assert same(state(models[1]), state(models[0]))
    return models[1]


def beside(companion: L.Callback, first: bool, **options: Any) -> list[L.Callback]:
    """The two callbacks in either order."""
    return [companion, lora(**options)] if first else [lora(**options), companion]


def outcome(t: L.Trainer, stage: str, model: LitTiny, **options: Any) -> Tensor:
    """What a stage gives: predictions, or its only number."""
    if stage == "predict":
        return torch.cat(t.predict(model, data(), **options))  # type: ignore[arg-type]
    (numbers,) = getattr(t, stage)(model, data(), verbose=False, **options)
    return torch.tensor(list(numbers.values()))


def loaded(path: Any) -> LitTiny:
    """A new module with the adapters of a file, or without any."""
    model = LitTiny()
    if path is not None:
        load_adapter(model, path)
    return model


either_order = pytest.mark.parametrize("first", [False, True], ids=["after", "before"])


def trainable(model: LitTiny) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def by_hand(
    optimizer: Optimizer,
    model: LitTiny,
    *,
    every: int = 1,
    clip: Callable[[list[nn.Parameter]], Any] = lambda _: None,
) -> None:
    """Train three epochs in plain torch."""
    batches = list(data())
    for _ in range(3):
        for first in range(0, len(batches), every):
            chunk = batches[first : first + every]

            def closure(chunk: Any = chunk) -> Tensor:
                optimizer.zero_grad()
                for batch in chunk:
                    value = model.loss(batch) / every
                    value.backward()
                clip([p for group in optimizer.param_groups for p in group["params"]])
                return value

            optimizer.step(closure)  # type: ignore[arg-type]


def adapted() -> LitTiny:
    torch.manual_seed(5)
    model = LitTiny()
    inject_adapters(model, lora().config)
    return model


class Notes(Logger):
    """A logger that keeps what it gets. As in MLflow, no value may change."""

    name, version = "notes", 0

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict[str, Any]] = []
        self.metrics: list[dict[str, float]] = []

    def log_hyperparams(self, params: Mapping[str, Any], *_: Any, **__: Any) -> None:
        changed = [key for each in self.seen for key, value in each.items() if params.get(key, value) != value]
        if changed:
            raise ValueError(f"{changed} cannot be changed")
        self.seen.append(dict(params))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append(metrics)

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


ON_EXCEPTION: dict[str, Callable[..., L.Callback]] = {"callback": OnExceptionCheckpoint}
if keeps_random:  # Lightning 2.6
    ON_EXCEPTION["option"] = partial(ModelCheckpoint, filename="on_exception", save_on_exception=True, save_top_k=0)


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in states]).mean(0) for name in states[0]}


def moving(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = states[0]
    for each in states[1:]:
        average = {name: 0.9 * value + 0.1 * each[name] for name, value in average.items()}
    return average


# The companion; the average at the end of four epochs of four steps; what validation sees after the first
AVERAGES: dict[str, tuple[Callable[[], L.Callback], Callable[[Any], Any], Callable[[Any], Any]]] = {}
if Version(torch.__version__) >= Version("2.6"):  # the state of its schedule could not be loaded safely before
    AVERAGES["swa"] = (
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=2),
        lambda after: mean(after[3:12:4]),  # as each epoch from the second on begins
        lambda after: after[3],  # it moves to the average when all is over
    )
if hasattr(bundled, "WeightAveraging"):
    AVERAGES["mean"] = (bundled.WeightAveraging, mean, lambda after: mean(after[:4]))
if hasattr(bundled, "EMAWeightAveraging"):
    AVERAGES["ema"] = (lambda: bundled.EMAWeightAveraging(decay=0.9), moving, lambda after: moving(after[:4]))

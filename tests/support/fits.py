"""Fits and what they give."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.model_helpers import is_overridden
from packaging.version import Version
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora import inject_adapters, load_adapter
from tests.support.cases import StopError, trained
from tests.support.compared import assert_same_tensors
from tests.support.models import LitTiny, data, lora, state, trainer
from tests.support.versions import keeps_random


class Stateful:
    """A loader that knows where it is, which is what Lightning needs to go on in the middle of an epoch."""

    def __init__(self) -> None:
        self.batches = list(data())
        self.at = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        # as the loaders of torch and torchdata draw a seed for their workers
        torch.rand(1)
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

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        self.after.append(trained(pl_module))


def fit(
    folder: Path,
    *callbacks: L.Callback,
    model: Any = None,
    train: Any = None,
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[Any, L.Trainer]:
    """Fit a module, or one of a class, or a LitTiny, with these callbacks; return it and its Trainer."""
    torch.manual_seed(5)
    if ckpt_path is not None:
        torch.manual_seed(6)  # a run that goes on does not find the numbers by chance
    if model is None:
        model = LitTiny
    if isinstance(model, type):
        model = model()
    if train is None:
        train = data()
    val = None
    if is_overridden("validation_step", model):
        val = data()
    t = trainer(folder, callbacks, **options)
    t.fit(model, train, val, ckpt_path=ckpt_path)
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
    """Fit, and again from the first run's file ``at``, to the same bits.

    Return that module. Each run has a folder.
    """
    unit, _, _ = at.partition("=")

    def run(model: Any, name: str, ckpt_path: Path | None) -> None:
        saves = ModelCheckpoint(
            folder / name, f"{{{unit}}}", save_top_k=-1, **(saving or {})
        )
        callbacks = [each() for each in make]
        fit(
            folder,
            *callbacks,
            saves,
            model=model,
            train=train(),
            ckpt_path=ckpt_path,
            **options,
        )

    through = build()
    resumed = build()
    run(through, "through", None)
    run(resumed, "resumed", folder / "through" / f"{at}.ckpt")
    assert_same_tensors(state(resumed), state(through))
    return resumed


def beside(companion: L.Callback, first: bool, **options: Any) -> list[L.Callback]:
    """The two callbacks in either order."""
    if first:
        return [companion, lora(**options)]
    return [lora(**options), companion]


def outcome(t: L.Trainer, stage: str, model: LitTiny, **options: Any) -> Tensor:
    """What a stage gives: predictions, or its only number."""
    if stage == "predict":
        predictions: Any = t.predict(model, data(), **options)
        return torch.cat(predictions)
    run = getattr(t, stage)
    (numbers,) = run(model, data(), verbose=False, **options)
    return torch.tensor(list(numbers.values()))


def loaded(path: Any) -> LitTiny:
    """A new module with the adapters of a file, or without any."""
    model = LitTiny()
    if path is not None:
        load_adapter(model, path)
    return model


either_order = pytest.mark.parametrize("first", [False, True], ids=["after", "before"])


def adam(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def parameters_in(optimizer: Optimizer) -> list[nn.Parameter]:
    """All parameters that an optimizer holds."""
    found: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        found += group["params"]
    return found


def by_hand(
    optimizer: Optimizer,
    model: LitTiny,
    *,
    every: int = 1,
    clip: Callable[[list[nn.Parameter]], Any] = lambda _: None,
) -> None:
    """Train three epochs in plain torch."""

    def step(chunk: list[Any]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            for batch in chunk:
                loss = model.loss(batch) / every
                loss.backward()  # type: ignore[no-untyped-call]
            clip(parameters_in(optimizer))
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]

    batches = list(data())
    for _ in range(3):
        for first in range(0, len(batches), every):
            step(batches[first : first + every])


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
        changed = []
        for earlier in self.seen:
            for key, value in earlier.items():
                if params.get(key, value) != value:
                    changed.append(key)
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
        first = torch.load(self.files[0], weights_only=True)
        second = torch.load(self.files[1], weights_only=True)
        assert_same_tensors(second, first)
        return first  # type: ignore[no-any-return]


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
    ON_EXCEPTION["option"] = partial(
        ModelCheckpoint, filename="on_exception", save_on_exception=True, save_top_k=0
    )


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for name in states[0]:
        values = [each[name] for each in states]
        found[name] = torch.stack(values).mean(0)
    return found


def moving(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = dict(states[0])
    for each in states[1:]:
        for name, value in each.items():
            average[name] = 0.9 * average[name] + 0.1 * value
    return average


States = Sequence[dict[str, Tensor]]
"""What trains after each of the steps of a fit."""


def swa() -> L.Callback:
    return StochasticWeightAveraging(0.1, swa_epoch_start=2)


def swa_at_the_end(after: States) -> dict[str, Tensor]:
    """The mean of what there is as each epoch from the second on begins."""
    return mean(after[3:12:4])


def last_of_first_epoch(after: States) -> dict[str, Tensor]:
    """What a validation sees of SWA, which moves to the average when all is over."""
    return after[3]


def mean_of_first_epoch(after: States) -> dict[str, Tensor]:
    return mean(after[:4])


def ema() -> L.Callback:
    return bundled.EMAWeightAveraging(decay=0.9)


def ema_of_first_epoch(after: States) -> dict[str, Tensor]:
    return moving(after[:4])


class Average(NamedTuple):
    """A callback, and what it gives."""

    make: Callable[[], L.Callback]
    at_the_end: Callable[[States], dict[str, Tensor]]
    """After four epochs of four steps."""

    seen_first: Callable[[States], dict[str, Tensor]]
    """By the validation after the first epoch."""


AVERAGES: dict[str, Average] = {}
# the state of its schedule could not be loaded safely before
if Version(torch.__version__) >= Version("2.6"):
    AVERAGES["swa"] = Average(swa, swa_at_the_end, last_of_first_epoch)
if hasattr(bundled, "WeightAveraging"):
    AVERAGES["mean"] = Average(bundled.WeightAveraging, mean, mean_of_first_epoch)
if hasattr(bundled, "EMAWeightAveraging"):
    AVERAGES["ema"] = Average(ema, moving, ema_of_first_epoch)

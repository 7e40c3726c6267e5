"""Adapted weights that code writes into while they train are named: what it writes does not reach the update."""

import contextlib
import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.cases import StopError
from tests.support.fits import AVERAGES, fit
from tests.support.messages import lines_with, messages_of
from tests.support.models import LitTiny, lora

NO_SAVES: dict[str, Any] = {"enable_checkpointing": False}


@torch.no_grad()
def normalise(weight: Tensor) -> None:
    """What is done to SwAV's prototypes."""
    weight.copy_(F.normalize(weight.clone()))


def mask(weight: Tensor) -> None:
    weight.data *= torch.eye(8)


def clamp(weight: Tensor) -> None:
    weight.data.clamp_(-0.1, 0.1)


class Writes(LitTiny):
    """A module whose step writes into a weight."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.write(self.v_proj.weight)
        return super().training_step(batch, batch_idx)

    def write(self, weight: Tensor) -> None:
        pass


class Normalises(Writes):
    def write(self, weight: Tensor) -> None:
        normalise(weight)


class Masks(Writes):
    def write(self, weight: Tensor) -> None:
        mask(weight)


class Clamps(Writes):
    def write(self, weight: Tensor) -> None:
        clamp(weight)


class Notes(L.Callback):
    """Notes what was said before each step and when the fit ends."""

    def __init__(self) -> None:
        self.said: list[int] = []
        self.caught: list[Any] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.said.append(len(about_writes(self.caught)))


def about_writes(caught: list[Any]) -> list[str]:
    return lines_with("has written into", messages_of(caught))


def said(folder: Path, model: Any, *callbacks: L.Callback, **options: Any) -> list[str]:
    """What a fit says of writes."""
    notes = Notes()
    return said_to(notes, folder, model, *callbacks, **options)


def said_to(
    notes: Notes, folder: Path, model: Any, *callbacks: L.Callback, **options: Any
) -> list[str]:
    """The same, of a fit in which is noted when it was said."""
    if not callbacks:
        callbacks = (lora(),)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notes.caught = caught
        fit(folder, *callbacks, notes, model=model, **options)
    return about_writes(caught)


@pytest.mark.parametrize("kind", [Normalises, Masks, Clamps])
def test_a_weight_that_code_writes_into_is_named_once_and_at_the_end_at_the_latest(
    tmp_path: Path, kind: Any
) -> None:
    notes = Notes()
    (message,) = said_to(notes, tmp_path, kind(), **NO_SAVES)
    assert f"the weight of 'v_proj' of {kind.__name__}" in message
    assert set(notes.said) == {0}
    assert "modules_to_save=['v_proj']" in message
    assert "exclude_modules=['v_proj']" in message


def test_it_is_named_at_the_first_save(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    notes = Notes()
    (message,) = said_to(notes, tmp_path, Clamps(), lora(), saves)
    assert "'v_proj'" in message
    assert notes.said == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("advice", ["modules_to_save", "exclude_modules"])
def test_what_the_message_says_ends_it(tmp_path: Path, advice: str) -> None:
    arguments: dict[str, Any] = {advice: ["v_proj"]}
    callback = ll.LoRACallback(r=2, **arguments)
    assert said(tmp_path, Clamps(), callback, **NO_SAVES) == []


class Once(LitTiny):
    """Its third step writes a single value, which a quick look at the weight misses."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 300)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 3:
            self.wide.weight.data.view(-1)[1] += 1
        of_wide = self.wide(self.embed(batch[0])).mean()
        return super().training_step(batch, batch_idx) + of_wide


def test_a_single_value_is_noticed_when_the_fit_ends(tmp_path: Path) -> None:
    (message,) = said(tmp_path, Once(), **NO_SAVES)
    assert "the weight of 'wide' of Once" in message


class Others(LitTiny):
    """What else changes in a fit: buffers, a norm, rows with max_norm, frozen weights without adapters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.embed.max_norm = 0.5
        self.register_buffer("count", torch.zeros(()))

    def forward(self, index: Tensor) -> Tensor:
        self.count += 1
        x = self.norm(self.embed(index))
        return self.head(torch.tanh(self.q_proj(x)) + self.v_proj(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        clamp(self.norm.weight)
        clamp(self.q_proj.bias)
        return super().training_step(batch, batch_idx)


@torch.no_grad()
def load(model: nn.Module) -> None:
    """Give a base other weights."""
    for p in model.parameters():
        if not p.requires_grad:
            p.add_(0.25)


class LoadsAsTheFitStarts(LitTiny):
    def on_fit_start(self) -> None:
        load(self)


class LoadsAsTrainingStarts(LitTiny):
    def on_train_start(self) -> None:
        load(self)


class Follows(LitTiny):
    """A frozen copy of a projection's network follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.copied = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        difference = self.net(x) - self.copied(x).detach()
        return super().forward(index) + self.head(difference)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for p, copied in zip(
            self.net.parameters(), self.copied.parameters(), strict=True
        ):
            copied.mul_(0.7).add_(p, alpha=0.3)


@pytest.mark.parametrize(
    "kind", [LitTiny, Others, LoadsAsTheFitStarts, LoadsAsTrainingStarts, Follows]
)
def test_other_changes_are_not_named(tmp_path: Path, kind: Any) -> None:
    assert said(tmp_path, kind()) == []


@pytest.mark.parametrize("companion", AVERAGES)
def test_averages_write_into_no_adapted_weight(tmp_path: Path, companion: str) -> None:
    average = AVERAGES[companion][0]()
    assert said(tmp_path, LitTiny(), lora(), average, max_epochs=4) == []


def test_a_run_that_goes_on_from_written_weights_names_only_what_it_writes(
    tmp_path: Path,
) -> None:
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    assert said(tmp_path, Clamps(), lora(), saves)
    file = tmp_path / "epoch=0.ckpt"
    assert said(tmp_path, Writes(), ckpt_path=file, **NO_SAVES) == []
    assert len(said(tmp_path, Normalises(), ckpt_path=file, **NO_SAVES)) == 1


class Stops(LitTiny):
    def on_train_batch_end(self, *_: Any) -> None:
        raise StopError


@pytest.mark.parametrize("build", [LitTiny, Stops])
def test_nothing_of_the_module_is_kept_after_a_fit_or_a_failure(
    tmp_path: Path, build: Callable[[], LitTiny]
) -> None:
    callback = ll.LoRACallback(r=2)
    with contextlib.suppress(StopError):
        fit(tmp_path, callback, model=build(), **NO_SAVES)
    tools = callback._stage.tools
    assert not tools.first_steps._copies.originals
    for guard in tools.guards.guards:
        for note in vars(guard).values():
            assert not getattr(note, "originals", note)

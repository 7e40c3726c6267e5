"""Adapted weights that code writes into while they train are named: what it writes does not reach the update."""

import contextlib
import copy
import warnings
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
from tests.support.models import LitTiny, lora

NO_SAVES: dict[str, Any] = {"enable_checkpointing": False}


def normalise(weight: Tensor) -> None:  # SwAV's prototypes
    with torch.no_grad():
        weight.copy_(F.normalize(weight.clone()))


def mask(weight: Tensor) -> None:
    weight.data *= torch.eye(8)


def clamp(weight: Tensor) -> None:
    weight.data.clamp_(-0.1, 0.1)


WRITES: dict[str, Any] = {"normalise": normalise, "mask": mask, "clamp": clamp, "nothing": lambda _: None}


class Writes(LitTiny):
    """A module whose step writes into a weight."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = write

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        WRITES[self.write](self.v_proj.weight)
        return super().training_step(batch, batch_idx)


class Notes(L.Callback):
    """Notes what was said before each step and when the fit ends."""

    def __init__(self) -> None:
        self.said: list[int] = []
        self.caught: list[Any] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.said.append(len(about_writes(self.caught)))


def about_writes(caught: list[Any]) -> list[str]:
    return [str(each.message) for each in caught if "has written into" in str(each.message)]


def said(folder: Path, model: Any, *callbacks: L.Callback, notes: Any = None, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notes = notes or Notes()
        notes.caught = caught
        fit(folder, *(callbacks or [lora()]), notes, model=model, **options)
    return about_writes(caught)


@pytest.mark.parametrize("write", ["normalise", "mask", "clamp"])
def test_a_weight_that_code_writes_into_is_named_once_and_at_the_end_at_the_latest(tmp_path: Path, write: str) -> None:
    (message,) = said(tmp_path, Writes(write), notes=(notes := Notes()), **NO_SAVES)
    assert "the weight of 'v_proj' of Writes" in message and set(notes.said) == {0}
    assert "modules_to_save=['v_proj']" in message and "exclude_modules=['v_proj']" in message


def test_it_is_named_at_the_first_save(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    (message,) = said(tmp_path, Writes("clamp"), lora(), saves, notes=(notes := Notes()))
    assert "'v_proj'" in message and notes.said == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("advice", ["modules_to_save", "exclude_modules"])
def test_what_the_message_says_ends_it(tmp_path: Path, advice: str) -> None:
    assert not said(tmp_path, Writes("clamp"), ll.LoRACallback(r=2, **{advice: ["v_proj"]}), **NO_SAVES)  # type: ignore[arg-type]


class Once(LitTiny):
    """Its third step writes a single value, which a quick look at the weight misses."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(8, 300)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.global_step == 3:
            self.wide.weight.data.view(-1)[1] += 1
        return super().training_step(batch, batch_idx) + self.wide(self.embed(batch[0])).mean()


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


class Loads(LitTiny):
    """Its own hooks load the base late."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        setattr(self, hook, self.load)

    def load(self) -> None:
        with torch.no_grad():
            for p in self.parameters():
                if not p.requires_grad:
                    p.add_(0.25)


class Follows(LitTiny):
    """A frozen copy of a projection's network follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.copied = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        return super().forward(index) + self.head(self.net(x) - self.copied(x).detach())

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for p, copied in zip(self.net.parameters(), self.copied.parameters(), strict=True):
                copied.mul_(0.7).add_(p, alpha=0.3)


@pytest.mark.parametrize(
    "build", [LitTiny, Others, lambda: Loads("on_fit_start"), lambda: Loads("on_train_start"), Follows]
)
def test_other_changes_are_not_named(tmp_path: Path, build: Any) -> None:
    assert not said(tmp_path, build())


@pytest.mark.parametrize("companion", AVERAGES)
def test_averages_write_into_no_adapted_weight(tmp_path: Path, companion: str) -> None:
    assert not said(tmp_path, LitTiny(), lora(), AVERAGES[companion][0](), max_epochs=4)


def test_a_run_that_goes_on_from_written_weights_names_only_what_it_writes(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    assert said(tmp_path, Writes("clamp"), lora(), saves)
    for write, count in (("nothing", 0), ("normalise", 1)):
        model = Writes(write)
        assert len(said(tmp_path, model, ckpt_path=tmp_path / "epoch=0.ckpt", **NO_SAVES)) == count


def test_nothing_of_the_module_is_kept_after_a_fit_or_a_failure(tmp_path: Path) -> None:
    for model in (LitTiny(), Stops()):
        callback = ll.LoRACallback(r=2)
        with contextlib.suppress(StopError):
            fit(tmp_path, callback, model=model, **NO_SAVES)
        steps = callback._stage.first_steps
        notes = [note for guard in steps.guards.guards for note in vars(guard).values()]
        assert not any(getattr(note, "originals", note) for note in (*notes, steps._copies))


class Stops(LitTiny):
    def on_train_batch_end(self, *_: Any) -> None:
        raise StopError

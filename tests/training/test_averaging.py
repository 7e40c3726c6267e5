"""Averages are those of the adapters alone."""

from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tests.support import fits
from tests.support.cases import (
    base_is_whole,
    files_hold_adapters_alone,
    held,
    same_parts,
    trained,
)
from tests.support.compared import assert_same_tensors
from tests.support.late import BornInConfigureModel, BornInSetup, BuiltAnew, Normed
from tests.support.messages import lines_with
from tests.support.models import LitTiny, X, best, is_plain, lora, state, trainer
from tests.support.versions import needs_averaging

each_average = pytest.mark.parametrize("average", fits.AVERAGES)


overrides_hook = pytest.mark.filterwarnings(
    "ignore:.*overrides the configure_model:UserWarning"
)

# Each with one order of the callbacks for a plain module, and the other one for a
# module whose layers come late
CASES = [
    ("swa", False, LitTiny),
    ("mean", True, LitTiny),
    ("ema", False, LitTiny),
    ("swa", True, BornInSetup),
    ("mean", False, BornInConfigureModel),
    ("ema", True, BuiltAnew),
]


def that_exist(cases: list[Any]) -> list[Any]:
    """The cases of the averages that these versions have."""
    return [case for case in cases if case[0] in fits.AVERAGES]


@overrides_hook
@pytest.mark.parametrize(("average", "first", "cls"), that_exist(CASES))
def test_averages_are_those_of_adapters_after_each_step(
    tmp_path: Path, average: str, first: bool, cls: Any
) -> None:
    make, at_end, _ = fits.AVERAGES[average]
    steps = fits.Steps()
    callbacks = [*fits.beside(make(), first), steps]
    model, _ = fits.fit(
        tmp_path, *callbacks, model=cls(), max_epochs=4, enable_checkpointing=False
    )
    expected = at_end(steps.after)
    torch.testing.assert_close(trained(model), expected)
    assert is_plain(model)
    merged = model(X)
    assert base_is_whole(model)
    torch.testing.assert_close(merged, model(X))


def state_in(file: Path | str) -> dict[str, Any]:
    """What trains, as a file has it."""
    return held(torch.load(file, weights_only=True))


class Numbers:
    """What a file gives, and whether a Trainer gives it too."""

    def __init__(self, path: str, score: float) -> None:
        self.path = path
        self.score = pytest.approx(score)
        plain = trainer(Path(path).parent)
        self.predicted = fits.outcome(plain, "predict", fits.loaded(path))

    def check(self, t: L.Trainer, module: LitTiny) -> None:
        for stage in ("test", "validate"):
            assert (
                fits.outcome(t, stage, module, ckpt_path=self.path).item() == self.score
            )
            # what was loaded stays
            assert fits.outcome(t, "test", module).item() == self.score
        predicted = fits.outcome(t, "predict", module, ckpt_path=self.path)
        torch.testing.assert_close(predicted, self.predicted)
        assert base_is_whole(module)


@pytest.mark.filterwarnings("ignore:.*outside the 'fit' stage:UserWarning")
@pytest.mark.parametrize(("first", "merge"), [(False, "last"), (True, "best")])
@each_average
def test_best_is_what_validation_saw_of_the_average(
    tmp_path: Path, average: str, first: bool, merge: Any
) -> None:
    make, _, seen = fits.AVERAGES[average]
    steps = fits.Steps()
    worst = best(tmp_path, mode="max")  # surely not the last
    light = ModelCheckpoint(
        tmp_path,
        "light-{step}",
        save_weights_only=True,
        every_n_train_steps=3,
        save_top_k=-1,
    )
    callbacks = [*fits.beside(make(), first, merge=merge), steps, worst, light]
    model, t = fits.fit(tmp_path, *callbacks, max_epochs=4)
    t.save_checkpoint(tmp_path / "after.ckpt")
    assert files_hold_adapters_alone(tmp_path)
    assert same_parts(state_in(tmp_path / "after.ckpt"), trained(model))
    path = worst.best_model_path
    assert path.endswith("epoch=0.ckpt")
    torch.testing.assert_close(state_in(path), seen(steps.after))
    assert worst.best_model_score is not None
    numbers = Numbers(path, worst.best_model_score.item())
    gives_the_best = fits.outcome(t, "test", model).item() == numbers.score
    assert gives_the_best is (merge == "best")
    numbers.check(t, model)
    numbers.check(trainer(tmp_path, fits.beside(make(), first)), LitTiny())
    numbers.check(trainer(tmp_path, [lora()]), LitTiny())


def without_folders(file: Path) -> dict[str, Any]:
    """A checkpoint without the states of ModelCheckpoints, which name their folders."""
    checkpoint: dict[str, Any] = torch.load(file, weights_only=True)
    for name in lines_with("ModelCheckpoint", checkpoint["callbacks"]):
        del checkpoint["callbacks"][name]
    return checkpoint


@overrides_hook
@pytest.mark.parametrize(
    ("first", "cls"), [(False, LitTiny), (True, BuiltAnew)], ids=["after", "before"]
)
@each_average
def test_resumed_average_has_the_same_bits(
    tmp_path: Path, average: str, first: bool, cls: type[LitTiny]
) -> None:
    # which Lightning itself resumes exactly at the end of an epoch alone
    if average == "swa":
        steps, at, end = None, "step=8", "step=16.ckpt"
    else:
        steps, at, end = 5, "step=10", "step=15.ckpt"
    make = [lora, fits.AVERAGES[average][0]]
    if first:
        make.reverse()
    resumed = fits.resumes_to_the_bit(
        tmp_path,
        cls,
        *make,
        at=at,
        train=fits.Stateful,
        saving={"every_n_train_steps": steps},
        max_epochs=4,
    )
    of_through = without_folders(tmp_path / "through" / end)
    of_resumed = without_folders(tmp_path / "resumed" / end)
    assert same_parts(of_resumed, of_through)
    assert base_is_whole(resumed)


class NormedTwice(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(4)

    def forward(self, index: Tensor) -> Tensor:
        return self.last(super().forward(index))


def test_averaging_leaves_frozen_norms_as_they_are(tmp_path: Path) -> None:
    average = StochasticWeightAveraging(0.1, swa_epoch_start=2)
    adapters = lora(modules_to_save=["head", "last"])
    model, _ = fits.fit(tmp_path, average, adapters, model=NormedTwice(), max_epochs=4)
    assert_same_tensors(state(model.norm), state(Normed().norm))
    assert type(model.norm) is nn.BatchNorm1d
    assert not torch.equal(model.last.running_mean, torch.zeros(4))


MASK = torch.tensor([-torch.inf, torch.inf, -0.0, 2.0])


class Masked(LitTiny):
    """A module with infinities in a buffer, as attention masks have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", MASK.clone())

    def forward(self, index: Tensor) -> Tensor:
        finite = self.mask.nan_to_num(neginf=0.0, posinf=0.0)  # type: ignore[operator]
        return super().forward(index) + finite


@needs_averaging
@pytest.mark.parametrize(
    ("make", "options", "precision"),
    [
        ("EMAWeightAveraging", {"decay": 0.9}, "32-true"),
        ("WeightAveraging", {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, "32-true"),
        # torch's own for lists takes only float32 on CPUs
        ("WeightAveraging", {}, "bf16-true"),
    ],
)
def test_averaging_leaves_infinities_in_a_buffer(
    tmp_path: Path, make: str, options: Any, precision: Any
) -> None:
    average = getattr(bundled, make)(use_buffers=True, **options)
    model, _ = fits.fit(tmp_path, average, lora(), model=Masked(), precision=precision)
    bits = model.mask.float().view(torch.int32)
    assert torch.equal(bits, MASK.view(torch.int32))  # -0.0 equals 0.0
    for p in model.parameters():
        assert p.isfinite().all()

"""Averages are those of the adapters alone."""

from itertools import cycle
from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as bundled
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tests.support import fits
from tests.support.cases import base_is_whole, files_hold_adapters_alone, held, same_parts, trained
from tests.support.late import BornInConfigureModel, BornInSetup, BuiltAnew, Normed
from tests.support.models import LitTiny, X, best, is_plain, lora, same, state, trainer
from tests.support.versions import needs_averaging

each_average = pytest.mark.parametrize("average", fits.AVERAGES)


overrides_hook = pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning")


@overrides_hook
@pytest.mark.parametrize(
    ("average", "first", "cls"),
    [
        *zip(fits.AVERAGES, cycle([False, True]), cycle([LitTiny]), strict=False),
        *zip(fits.AVERAGES, cycle([True, False]), [BornInSetup, BornInConfigureModel, BuiltAnew], strict=False),
    ],
)
def test_averages_are_those_of_adapters_after_each_step(tmp_path: Path, average: str, first: bool, cls: Any) -> None:
    make, at_end, _ = fits.AVERAGES[average]
    callbacks = [*fits.beside(make(), first), steps := fits.Steps()]
    model, _ = fits.fit(tmp_path, *callbacks, model=cls(), max_epochs=4, enable_checkpointing=False)
    torch.testing.assert_close(trained(model), at_end(steps.after))
    assert is_plain(model)
    merged = model(X)
    assert base_is_whole(model)
    torch.testing.assert_close(merged, model(X))


@pytest.mark.filterwarnings("ignore:.*outside the 'fit' stage:UserWarning")
@pytest.mark.parametrize(("first", "merge"), [(False, "last"), (True, "best")])
@each_average
def test_best_is_what_validation_saw_of_the_average(tmp_path: Path, average: str, first: bool, merge: Any) -> None:
    make, _, seen = fits.AVERAGES[average]
    steps, worst = fits.Steps(), best(tmp_path, mode="max")  # surely not the last
    light = ModelCheckpoint(tmp_path, "light-{step}", save_weights_only=True, every_n_train_steps=3, save_top_k=-1)
    model, t = fits.fit(tmp_path, *fits.beside(make(), first, merge=merge), steps, worst, light, max_epochs=4)
    t.save_checkpoint(tmp_path / "after.ckpt")
    assert files_hold_adapters_alone(tmp_path)
    assert same_parts(held(torch.load(tmp_path / "after.ckpt", weights_only=True)), trained(model))
    path, score = worst.best_model_path, pytest.approx(worst.best_model_score.item())  # type: ignore[union-attr]
    assert path.endswith("epoch=0.ckpt") and (fits.outcome(t, "test", model).item() == score) is (merge == "best")
    torch.testing.assert_close(held(torch.load(path, weights_only=True)), seen(steps.after))
    predicted = fits.outcome(trainer(tmp_path), "predict", fits.loaded(path))
    new = [(trainer(tmp_path, callbacks), LitTiny()) for callbacks in (fits.beside(make(), first), [lora()])]
    for stages, module in ((t, model), *new):
        for stage in ("test", "validate"):
            assert fits.outcome(stages, stage, module, ckpt_path=path).item() == score
            assert fits.outcome(stages, "test", module).item() == score  # what was loaded stays
        torch.testing.assert_close(fits.outcome(stages, "predict", module, ckpt_path=path), predicted)
        assert base_is_whole(module)


@overrides_hook
@pytest.mark.parametrize(("first", "cls"), [(False, LitTiny), (True, BuiltAnew)], ids=["after", "before"])
@each_average
def test_resumed_average_has_the_same_bits(tmp_path: Path, average: str, first: bool, cls: type[LitTiny]) -> None:
    # Lightning itself resumes SWA exactly at the end of an epoch alone
    steps, at, end = (None, "step=8", "step=16.ckpt") if average == "swa" else (5, "step=10", "step=15.ckpt")
    make = [fits.AVERAGES[average][0], lora] if first else [lora, fits.AVERAGES[average][0]]
    resumed = fits.resumes_to_the_bit(
        tmp_path, cls, *make, at=at, train=fits.Stateful, saving={"every_n_train_steps": steps}, max_epochs=4
    )
    a, b = (torch.load(tmp_path / name / end, weights_only=True) for name in ("through", "resumed"))
    for checkpoint in (a, b):
        for name in list(checkpoint["callbacks"]):
            if name.startswith("ModelCheckpoint"):
                del checkpoint["callbacks"][name]  # it names its folder
    assert same_parts(a, b)
    assert base_is_whole(resumed)


class NormedTwice(Normed):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.BatchNorm1d(4)

    def forward(self, index: Tensor) -> Tensor:
        return self.last(super().forward(index))


def test_averaging_leaves_frozen_norms_as_they_are(tmp_path: Path) -> None:
    callbacks = [StochasticWeightAveraging(0.1, swa_epoch_start=2), lora(modules_to_save=["head", "last"])]
    model, _ = fits.fit(tmp_path, *callbacks, model=NormedTwice(), max_epochs=4)
    assert same(state(model.norm), state(Normed().norm)) and type(model.norm) is nn.BatchNorm1d
    assert not torch.equal(model.last.running_mean, torch.zeros(4))


MASK = torch.tensor([-torch.inf, torch.inf, -0.0, 2.0])


class Masked(LitTiny):  # with infinities in a buffer, as attention masks have
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", MASK.clone())

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index) + self.mask.nan_to_num(neginf=0.0, posinf=0.0)  # type: ignore[operator]


@needs_averaging
@pytest.mark.parametrize(
    ("make", "options", "precision"),
    [
        ("EMAWeightAveraging", {"decay": 0.9}, "32-true"),
        ("WeightAveraging", {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, "32-true"),
        ("WeightAveraging", {}, "bf16-true"),  # torch's own for lists takes only float32 on CPUs
    ],
)
def test_averaging_leaves_infinities_in_a_buffer(tmp_path: Path, make: str, options: Any, precision: Any) -> None:
    average = getattr(bundled, make)(use_buffers=True, **options)
    model, _ = fits.fit(tmp_path, average, lora(), model=Masked(), precision=precision)
    assert torch.equal(model.mask.float().view(torch.int32), MASK.view(torch.int32))  # the bits: -0.0 equals 0.0
    assert all(p.isfinite().all() for p in model.parameters())

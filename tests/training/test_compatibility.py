"""Other callbacks and options mean what they always mean, and tuners leave no trace but what they found."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import Optimizer

from lightning_lora import inject_adapters
from lightning_lora.model.records import find_record
from tests.support.cases import (
    base_is_whole,
    file_names,
    files_hold_adapters_alone,
    same_parts,
    trained,
)
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.fits import AVERAGES, adam, adapted, by_hand, fit, resumes_to_the_bit
from tests.support.models import LitTiny, X, data, is_plain, lora, state, trainer
from tests.support.parameters import chosen, classes, flags_of, trainable
from tests.support.versions import exact


def clip(parameters: Any) -> Any:
    return nn.utils.clip_grad_norm_(parameters, 0.1)


def sgd(parameters: Any) -> Optimizer:
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def lbfgs(parameters: Any) -> Optimizer:
    """Calls its closure several times in a step, and Lightning accumulates and clips in each."""
    return torch.optim.LBFGS(
        parameters, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"
    )


# What the Trainer has, and how a plain loop does it
@pytest.mark.parametrize(
    ("make", "options", "loop"),
    [
        (adam, {}, {}),
        (adam, {"accumulate_grad_batches": 3}, {"every": 3}),
        (adam, {"gradient_clip_val": 0.1}, {"clip": clip}),
        (sgd, {"gradient_clip_val": 0.1}, {"clip": clip}),
        (lbfgs, {}, {}),
    ],
)
def test_training_is_that_of_a_plain_loop_over_the_adapters(
    tmp_path: Path, make: Callable[[Any], Optimizer], options: Any, loop: Any
) -> None:
    expected = adapted()
    by_hand(make(trainable(expected)), expected, **loop)

    def build() -> LitTiny:
        model = LitTiny()
        model.configure_optimizers = lambda: make(model.parameters())  # type: ignore[method-assign]
        return model

    found = resumes_to_the_bit(
        tmp_path,
        build,
        partial(lora, merge=False),
        at="epoch=1",
        max_epochs=3,
        **options,
    )
    assert_same_tensors(state(found), state(expected))
    assert base_is_whole(found)
    assert files_hold_adapters_alone(tmp_path)
    through = torch.load(tmp_path / "through" / "epoch=2.ckpt", weights_only=True)
    resumed = torch.load(tmp_path / "resumed" / "epoch=2.ckpt", weights_only=True)
    parts = ("optimizer_states", "lr_schedulers", "lightning_lora")
    assert same_parts(chosen(resumed, parts), chosen(through, parts))


@pytest.mark.filterwarnings("ignore:.*barebones=True:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"barebones": True, "default_root_dir": None},
        {"detect_anomaly": True, "inference_mode": False},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_trainer_options_mean_what_they_mean_without_the_callback(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {"max_epochs": 3, "enable_checkpointing": False, **options}
    # on a module that is adapted already
    by_lightning, _ = fit(tmp_path, model=adapted(), **options)
    model, t = fit(tmp_path, lora(), **options)
    assert is_plain(model)
    assert same_parts(trained(model), trained(by_lightning))
    if "barebones" not in options:
        t.save_checkpoint(tmp_path / "after.ckpt")
        assert files_hold_adapters_alone(tmp_path)
    assert base_is_whole(model)


# Tuners leave no trace but what they found


class OwnData(LitTiny):
    """A module with loaders of its own, whose batch size is to be found."""

    def __init__(self, lr: float = 0.05, batch_size: int = 2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return data(batch_size=self.hparams["batch_size"])

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def plain(folder: Path) -> OwnData:
    return OwnData()


def with_adapters(folder: Path) -> OwnData:
    model = OwnData()
    inject_adapters(model, lora().config)
    return model


def merged(folder: Path) -> OwnData:
    model = with_adapters(folder)
    fit(folder, lora(), model=model, enable_checkpointing=False)
    return model


def lr_find(model: LitTiny, t: L.Trainer) -> None:
    Tuner(t).lr_find(model, num_training=14, early_stop_threshold=None)


def scale_in_fit(model: LitTiny, t: L.Trainer) -> None:
    Tuner(t).scale_batch_size(model, method="fit", max_trials=2, steps_per_trial=1)


def scale_in_validate(model: LitTiny, t: L.Trainer) -> None:
    Tuner(t).scale_batch_size(model, method="validate", max_trials=2, steps_per_trial=1)


def scale_in_predict(model: LitTiny, t: L.Trainer) -> None:
    Tuner(t).scale_batch_size(model, method="predict", max_trials=2, steps_per_trial=1)


@pytest.mark.parametrize(
    ("tune", "build"),
    [
        (lr_find, merged),
        (scale_in_fit, merged),
        (scale_in_fit, with_adapters),
        (scale_in_validate, plain),
        (scale_in_predict, merged),
    ],
)
def test_tuning_gives_the_module_back_as_it_came(
    tmp_path: Path, tune: Any, build: Any
) -> None:
    model = build(tmp_path)
    before = state(model)
    output = model(X)
    classes_before = classes(model)
    flags = flags_of(model)
    tune(model, trainer(tmp_path, [lora()], enable_checkpointing=False))
    assert torch.equal(model(X), output)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert classes(model) == classes_before
    assert_same_tensors(state(model), before)
    assert flags_of(model) == flags
    assert find_record(model) is None or base_is_whole(model)


@pytest.mark.parametrize("tune", [lr_find, scale_in_fit])
def test_tuning_of_a_fit_may_leave_fresh_adapters_for_the_fit_that_is_to_come(
    tmp_path: Path, tune: Any
) -> None:
    model = OwnData()
    before = state(model)
    output = model(X)
    tune(model, trainer(tmp_path, [lora()], enable_checkpointing=False))
    assert torch.equal(model(X), output)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert_holds(state(model), before)
    assert find_record(model) is None or base_is_whole(model)


def finds_lr() -> L.Callback:
    return LearningRateFinder(num_training_steps=14, early_stop_threshold=None)


def finds_batch_size() -> L.Callback:
    return BatchSizeFinder(max_trials=3, steps_per_trial=2)


LR_WITH_AN_AVERAGE = [(finds_lr, "lr", average) for average in list(AVERAGES)[-1:]]
"""With one of the averages that this version of Lightning has, if there is any."""


@exact
@pytest.mark.parametrize(
    ("finder", "name", "average"),
    [
        (finds_lr, "lr", None),
        (finds_batch_size, "batch_size", None),
        *LR_WITH_AN_AVERAGE,
    ],
)
def test_fit_with_a_finder_is_fit_with_what_it_finds(
    tmp_path: Path, finder: Any, name: str, average: Any
) -> None:
    def fitted(model: OwnData, folder: Path, *callbacks: L.Callback) -> OwnData:
        torch.manual_seed(5)
        saves = ModelCheckpoint(folder, "{step}", save_top_k=-1)
        averages = [AVERAGES[average][0]()] if average else []
        trainer(tmp_path, [lora(), *callbacks, saves, *averages]).fit(model)
        return model

    found = fitted(OwnData(), tmp_path / "found", finder())
    told = OwnData()
    told.hparams[name] = found.hparams[name]
    fitted(told, tmp_path / "told")
    assert found.hparams[name] != OwnData().hparams[name]
    assert is_plain(found)
    assert_same_tensors(state(found), state(told))
    assert_same_tensors(trained(found), trained(told))
    assert base_is_whole(found)
    assert files_hold_adapters_alone(tmp_path)
    assert file_names(tmp_path / "found") == file_names(tmp_path / "told")
    assert not list(tmp_path.glob(".*"))

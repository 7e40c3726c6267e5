"""Other callbacks and options mean what they always mean, and tuners leave no trace but what they found."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.optim import Optimizer

from lightning_lora import inject_adapters
from lightning_lora.model.record import find_record
from tests.support.cases import base_is_whole, files_hold_adapters_alone, same_parts, trained
from tests.support.fits import AVERAGES, adam, adapted, by_hand, fit, resumes_to_the_bit, trainable
from tests.support.models import LitTiny, X, data, is_plain, lora, same, state, trainer
from tests.support.versions import exact

# What the Trainer has, and how a plain loop does it
TRAINING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "accumulate": ({"accumulate_grad_batches": 3}, {"every": 3}),
    "clip": ({"gradient_clip_val": 0.1}, {"clip": lambda p: nn.utils.clip_grad_norm_(p, 0.1)}),
}
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adam": adam,
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, line_search_fn="strong_wolfe"),
}


# LBFGS calls its closure several times in a step, and Lightning accumulates and clips in each
@pytest.mark.parametrize(
    ("optimizer", "training"),
    [*(("adam", training) for training in TRAINING), ("sgd", "clip"), ("lbfgs", "plain")],
)
def test_training_is_that_of_a_plain_loop_over_the_adapters(tmp_path: Path, optimizer: str, training: str) -> None:
    options, loop = TRAINING[training]
    expected = adapted()
    by_hand(OPTIMIZERS[optimizer](trainable(expected)), expected, **loop)

    def build() -> LitTiny:
        model = LitTiny()
        model.configure_optimizers = lambda: OPTIMIZERS[optimizer](model.parameters())  # type: ignore[method-assign]
        return model

    found = resumes_to_the_bit(tmp_path, build, lambda: lora(merge=False), at="epoch=1", max_epochs=3, **options)
    assert same(state(found), state(expected)) and base_is_whole(found)
    a, b = (torch.load(tmp_path / name / "epoch=2.ckpt", weights_only=True) for name in ("through", "resumed"))
    assert files_hold_adapters_alone(tmp_path)
    for key in ("optimizer_states", "lr_schedulers", "lightning_lora"):
        assert same_parts(a[key], b[key]), key


OPTIONS: list[dict[str, Any]] = [
    {"barebones": True, "default_root_dir": None},
    {"detect_anomaly": True, "inference_mode": False},
    {"precision": "bf16-mixed"},
]


@pytest.mark.filterwarnings("ignore:.*barebones=True:UserWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_trainer_options_mean_what_they_mean_without_the_callback(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"max_epochs": 3, "enable_checkpointing": False, **options}
    by_hand, _ = fit(tmp_path, model=adapted(), **options)  # Lightning itself, on a module that is adapted already
    model, t = fit(tmp_path, lora(), **options)
    assert is_plain(model) and same_parts(trained(model), trained(by_hand))
    if "barebones" not in options:
        t.save_checkpoint(tmp_path / "after.ckpt")
        assert files_hold_adapters_alone(tmp_path)
    assert base_is_whole(model)


# Tuners leave no trace but what they found


class OwnData(LitTiny):  # with loaders of its own, whose batch size is to be found
    def __init__(self, lr: float = 0.05, batch_size: int = 2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return data(batch_size=self.hparams["batch_size"])

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("method", "came"),
    [
        *product(["lr_find", "fit"], ["plain", "merged"]),
        ("fit", "adapted"),
        ("validate", "plain"),
        ("predict", "merged"),
    ],
)
def test_tuning_gives_the_module_back_as_it_came(tmp_path: Path, method: Any, came: str) -> None:
    model = OwnData()
    if came != "plain":
        inject_adapters(model, lora().config)
    if came == "merged":
        fit(tmp_path, lora(), model=model, enable_checkpointing=False)
    t = trainer(tmp_path, [lora()], enable_checkpointing=False)
    before, kinds = state(model), [type(module) for module in model.modules()]
    flags, output = [p.requires_grad for p in model.parameters()], model(X)
    if method == "lr_find":
        Tuner(t).lr_find(model, num_training=14, early_stop_threshold=None)
    else:
        Tuner(t).scale_batch_size(model, method=method, max_trials=2, steps_per_trial=1)
    assert torch.equal(model(X), output) and not list(tmp_path.rglob("*.ckpt"))
    if came == "plain" and method in ("lr_find", "fit"):  # it may have fresh adapters now, for the fit that is to come
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    else:
        assert [type(module) for module in model.modules()] == kinds and same(state(model), before)
        assert [p.requires_grad for p in model.parameters()] == flags
    assert find_record(model) is None or base_is_whole(model)


def finds_lr() -> L.Callback:
    return LearningRateFinder(num_training_steps=14, early_stop_threshold=None)


def finds_batch_size() -> L.Callback:
    return BatchSizeFinder(max_trials=3, steps_per_trial=2)


@exact
@pytest.mark.parametrize(
    ("finder", "name", "average"),
    [
        (finds_lr, "lr", None),
        (finds_batch_size, "batch_size", None),
        *((finds_lr, "lr", average) for average in list(AVERAGES)[-1:]),
    ],
)
def test_fit_with_a_finder_is_fit_with_what_it_finds(tmp_path: Path, finder: Any, name: str, average: Any) -> None:
    found, plain = OwnData(), OwnData()
    for model, callbacks in ((found, [finder()]), (plain, [])):
        torch.manual_seed(5)
        callbacks.append(ModelCheckpoint(tmp_path / str(model is found), "{step}", save_top_k=-1))
        if average:
            callbacks.append(AVERAGES[average][0]())
        trainer(tmp_path, [lora(), *callbacks]).fit(model)
        plain.hparams[name] = found.hparams[name]
    assert found.hparams[name] != OwnData().hparams[name] and is_plain(found)
    assert same(state(found), state(plain)) and same(trained(found), trained(plain)) and base_is_whole(found)
    names = [[file.name for file in sorted((tmp_path / str(each)).iterdir())] for each in (True, False)]
    assert files_hold_adapters_alone(tmp_path) and names[0] == names[1] and not list(tmp_path.glob(".*"))

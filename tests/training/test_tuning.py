"""Tuners leave no trace but what they found."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_lora import inject_adapters
from lightning_lora.model.state import find_record
from tests.support.averages import AVERAGES
from tests.support.checks import base_is_whole, files_hold_adapters_alone, trained
from tests.support.fits import fit
from tests.support.models import TRAINED, LitTiny, X, data, is_plain, lora, same, state, trainer
from tests.support.versions import exact


class OwnData(LitTiny):  # with loaders of its own, whose batch size is to be found
    shuffle = True

    def __init__(self, lr: float = 0.05, batch_size: int = 2) -> None:
        super().__init__(lr=lr)
        self.save_hyperparameters()

    def train_dataloader(self) -> Any:
        return DataLoader(data().dataset, batch_size=self.hparams["batch_size"], shuffle=self.shuffle)

    def val_dataloader(self) -> Any:
        return data(batch_size=self.hparams["batch_size"])

    test_dataloader = predict_dataloader = val_dataloader


class HandsOut(OwnData):  # that built its optimizer early
    def __init__(self, lr: float = 0.05, batch_size: int = 2) -> None:
        super().__init__(lr=lr, batch_size=batch_size)
        self.made = torch.optim.AdamW(self.parameters(), lr=lr)

    def configure_optimizers(self) -> Any:
        return self.made


TUNING: dict[str, tuple[Callable[[L.Trainer, OwnData], Any], str]] = {
    "lr": (lambda t, m: Tuner(t).lr_find(m, num_training=14, early_stop_threshold=None), "lr"),
    "batch size": (lambda t, m: Tuner(t).scale_batch_size(m, max_trials=3, steps_per_trial=2), "batch_size"),
}


@exact
@pytest.mark.parametrize("cls", [OwnData, HandsOut])
@pytest.mark.parametrize("tuning", TUNING)
def test_fit_after_tuning_is_fit_with_what_was_found(tmp_path: Path, tuning: str, cls: type[OwnData]) -> None:
    tune, name = TUNING[tuning]
    numbers: dict[str, Any] = {}
    ends = []
    for tuned in (True, False):
        torch.manual_seed(5)
        model, t = cls(**numbers), trainer(tmp_path, [lora(dropout=0.3)], enable_checkpointing=False)
        inject_adapters(model, lora(dropout=0.3).config)
        before = state(model)
        if tuned:
            tune(t, model)
            assert same(state(model), before) and not list(tmp_path.iterdir())
            assert model.hparams[name] != cls().hparams[name]
            numbers = {name: model.hparams[name]}
        torch.manual_seed(6)
        t.fit(model)
        ends.append(state(model))
        held = [p for group in t.optimizers[0].param_groups for p in group["params"]]
        assert base_is_whole(model) and {id(p) for p in held} == {id(model.get_parameter(each)) for each in TRAINED}
    assert same(*ends)


@pytest.mark.parametrize("tuning", TUNING)
def test_tuning_leaves_the_random_numbers_where_lightning_does(tmp_path: Path, tuning: str) -> None:
    states = []
    for callbacks in ([lora()], []):
        model = OwnData()
        if callbacks:
            inject_adapters(model, lora().config)
        torch.manual_seed(7)
        TUNING[tuning][0](trainer(tmp_path, callbacks, enable_checkpointing=False), model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("came", ["plain", "adapted", "merged"])
@pytest.mark.parametrize("method", ["lr_find", "fit", "validate", "test", "predict"])
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
        TUNING["lr"][0](t, model)
    else:
        Tuner(t).scale_batch_size(model, method=method, max_trials=2, steps_per_trial=1)
    assert torch.equal(model(X), output) and not list(tmp_path.rglob("*.ckpt"))
    if came == "plain" and method in ("lr_find", "fit"):  # it may have fresh adapters now, for the fit that is to come
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    else:
        assert [type(module) for module in model.modules()] == kinds and same(state(model), before)
        assert [p.requires_grad for p in model.parameters()] == flags
    assert find_record(model) is None or base_is_whole(model)


class InOrder(OwnData):  # the same, in order: Lightning's callbacks draw a loader's order another time
    shuffle = False


FINDERS: dict[str, tuple[Callable[[], L.Callback], str]] = {
    "lr": (lambda: LearningRateFinder(num_training_steps=14, early_stop_threshold=None), "lr"),
    "batch size": (lambda: BatchSizeFinder(max_trials=3, steps_per_trial=2), "batch_size"),
}


@exact
@pytest.mark.parametrize("average", ["none", *AVERAGES])
@pytest.mark.parametrize("finder", FINDERS)
def test_fit_with_a_finder_is_fit_with_what_it_finds(tmp_path: Path, finder: str, average: str) -> None:
    make, name = FINDERS[finder]
    found, plain = InOrder(), InOrder()
    for model, callbacks in ((found, [make()]), (plain, [])):
        torch.manual_seed(5)
        callbacks.append(ModelCheckpoint(tmp_path / str(model is found), "{step}", save_top_k=-1))
        if average != "none":
            callbacks.append(AVERAGES[average][0]())
        trainer(tmp_path, [lora(), *callbacks]).fit(model)
        plain.hparams[name] = found.hparams[name]
    assert found.hparams[name] != OwnData().hparams[name] and is_plain(found)
    assert same(state(found), state(plain)) and same(trained(found), trained(plain)) and base_is_whole(found)
    names = [[file.name for file in sorted((tmp_path / str(each)).iterdir())] for each in (True, False)]
    assert files_hold_adapters_alone(tmp_path) and names[0] == names[1] and not list(tmp_path.glob(".*"))

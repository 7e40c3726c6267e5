"""The strategy loads and saves adapters at the right moments."""

import copy
import pickle
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from lightning_lora import AdapterStateError, StrategyError, load_adapter, remove_adapters
from tests.support.cases import StopError, held, stop, tensors
from tests.support.models import TRAINED, WIDTH, WORDS, LitTiny, best, data, is_plain, lora, same, state, trainer
from tests.support.training import (
    ON_EXCEPTION,
    BornInConfigureModel,
    BornInSetup,
    Fails,
    Stateful,
    Steps,
    base_is_whole,
    files_hold_adapters_alone,
    same_parts,
)

SAVING: dict[str, dict[str, Any]] = {
    "best": {"monitor": "val_loss"},
    "two best": {"monitor": "val_loss", "mode": "max", "save_top_k": 2},
    "last": {"save_last": True},
    "link": {"save_last": "link", "save_top_k": -1},
    "last alone": {"save_top_k": 0, "save_last": True},
    "none": {"save_top_k": 0},
    "epochs": {"save_top_k": -1, "every_n_epochs": 2},
    "steps": {"save_top_k": -1, "every_n_train_steps": 3},
    "time": {"save_top_k": -1, "train_time_interval": timedelta(microseconds=1)},
    "train epoch": {"save_top_k": -1, "save_on_train_epoch_end": True},
    "weights": {"save_top_k": -1, "save_last": True, "save_weights_only": True},
}


@pytest.mark.parametrize("saving", SAVING)
def test_each_file_holds_the_adapters_of_its_step_and_goes_on(tmp_path: Path, saving: str) -> None:
    model, steps = LitTiny(), Steps()
    saves = ModelCheckpoint(tmp_path / "files", "{epoch}-{step}", **SAVING[saving])
    torch.manual_seed(5)
    trainer(tmp_path, [lora(), steps, saves], max_epochs=3).fit(model, Stateful(), data())
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert files_hold_adapters_alone(tmp_path) is (saving != "none") is bool(files)
    for file in files[:: max(1, len(files) // 3)]:
        checkpoint = torch.load(file, weights_only=True)
        assert same_parts(
            held(checkpoint), {name: steps.after[checkpoint["global_step"] - 1][name] for name in TRAINED}
        )
        again = LitTiny()
        t = trainer(tmp_path, [lora()], max_epochs=3, enable_checkpointing=False)
        if "optimizer_states" in checkpoint:
            t.fit(again, Stateful(), data(), ckpt_path=file)
            assert same(state(again), state(model)) and t.global_step == 12
        else:
            t.validate(again, data(), ckpt_path=file, verbose=False)
        assert base_is_whole(again)
    assert base_is_whole(model)


@pytest.mark.parametrize("kind", ON_EXCEPTION)
def test_failed_run_goes_on_from_the_file_of_its_failure(tmp_path: Path, kind: str) -> None:
    through, failed, resumed = LitTiny(), LitTiny(), LitTiny()
    torch.manual_seed(5)
    trainer(tmp_path, [lora()], max_epochs=3, enable_checkpointing=False).fit(through, Stateful(), data())
    torch.manual_seed(5)
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path), Fails()], max_epochs=3)
    with pytest.raises(StopError):
        t.fit(failed, Stateful(), data())
    assert files_hold_adapters_alone(tmp_path) and base_is_whole(failed)
    (file,) = tmp_path.rglob("on_exception*.ckpt")
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path)], max_epochs=3)
    t.fit(resumed, Stateful(), data(), ckpt_path=None if kind == "callback" else file)
    assert same(state(resumed), state(through)) and t.global_step == 12 and base_is_whole(resumed)
    assert file.exists() is (kind != "callback")  # it removes its file after a fit that ends


class Unreadable(L.LightningDataModule):
    """Its samples cannot be loaded any more."""

    def train_dataloader(self) -> Any:
        raise StopError


@pytest.mark.parametrize("kind", ON_EXCEPTION)
def test_resumed_run_that_fails_before_its_first_step_keeps_what_was_trained(tmp_path: Path, kind: str) -> None:
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path), Fails()], max_epochs=3)
    with pytest.raises(StopError):
        t.fit(LitTiny(), Stateful(), data())
    (file,) = tmp_path.rglob("on_exception*.ckpt")
    before, model = held(torch.load(file, weights_only=True)), LitTiny()
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path)], max_epochs=3)
    with pytest.raises(StopError):
        t.fit(model, datamodule=Unreadable(), ckpt_path=file)
    assert same(held(torch.load(file, weights_only=True)), before)
    assert same({name: state(model)[name] for name in before}, before)


def test_sharding_strategy_is_refused(tmp_path: Path) -> None:
    t = trainer(tmp_path, [lora()])
    type(t.strategy).restore_checkpoint_after_setup = property(lambda _: True)  # type: ignore[assignment]
    try:
        with pytest.raises(StrategyError, match="SingleDeviceStrategy shards"):
            t.fit(LitTiny(), data())
    finally:
        del type(t.strategy).restore_checkpoint_after_setup


X = torch.arange(WORDS)


class LoadsInSetup(LitTiny):
    """A module that loads its pretrained weights in ``setup``, strictly."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.parameters():
            p.data.zero_()

    def setup(self, stage: str) -> None:
        self.load_state_dict(LitTiny().state_dict())


@pytest.mark.parametrize("cls", [BornInSetup, BornInConfigureModel, LoadsInSetup])
def test_layers_and_weights_that_come_late(tmp_path: Path, cls: type[LitTiny]) -> None:
    expected, model = LitTiny(), cls()
    for each in (expected, model):
        torch.manual_seed(5)
        t = trainer(tmp_path, [lora(), best(tmp_path / cls.__name__ / str(each is model), monitor=None)])
        t.fit(each, data(), data())
    assert is_plain(model)
    torch.testing.assert_close(model(X), expected(X))
    assert sorted(tensors(t.checkpoint_callback.best_model_path)) == sorted(TRAINED)  # type: ignore[union-attr]
    new = cls()
    trainer(tmp_path, [lora()]).test(new, data(), ckpt_path=t.checkpoint_callback.best_model_path, verbose=False)  # type: ignore[union-attr]
    torch.testing.assert_close(new(X), expected(X))


class LoadsBuffersInSetup(LitTiny):
    """A module whose norm has statistics that only ``setup`` loads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.q_proj(self.embed(index))) + self.v_proj(self.embed(index))))

    def setup(self, stage: str) -> None:
        self.norm.running_mean.fill_(0.5)  # type: ignore[union-attr]


def test_buffers_that_come_late_belong_to_the_base(tmp_path: Path) -> None:
    model = LoadsBuffersInSetup()
    t = trainer(tmp_path, [lora(modules_to_save=["head", "norm"])])
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "lora.ckpt")
    assert "norm.running_mean" in tensors(tmp_path / "lora.ckpt")
    base = LoadsBuffersInSetup()
    base.setup("fit")
    load_adapter(base, tmp_path / "lora.ckpt")
    torch.testing.assert_close(base.eval()(X), model.eval()(X))


class ReadsAtEnd(L.Callback):
    """Reads a file through the strategy when the fit has ended."""

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        before = state(pl_module)
        trainer.strategy.load_checkpoint(trainer.checkpoint_callback.best_model_path)  # type: ignore[union-attr]
        assert same(state(pl_module), before)


@pytest.mark.parametrize("merge", ["last", False])
@pytest.mark.parametrize("stage", [None, "validate", "test", "predict"])
def test_a_file_that_is_read_outside_a_stage_changes_nothing_until_it_is_loaded(
    tmp_path: Path, stage: str | None, merge: Any
) -> None:
    model, worst = LitTiny(), best(tmp_path, mode="max")
    t = trainer(tmp_path, [lora(merge=merge), worst, ReadsAtEnd()], max_epochs=3)
    t.fit(model, data(), data())
    if stage is not None:
        getattr(t, stage)(model, data())
    before = state(model)
    checkpoint = t.strategy.load_checkpoint(worst.best_model_path)
    assert same(state(model), before) and is_plain(model) is bool(merge)
    t.strategy.load_model_state_dict(checkpoint)
    expected = LitTiny()
    load_adapter(expected, worst.best_model_path)
    torch.testing.assert_close(model(X), expected(X))
    assert is_plain(model) is bool(merge) and base_is_whole(model)
    remove_adapters(model)
    plain = state(LitTiny())
    t.strategy.load_checkpoint(worst.best_model_path)
    t.strategy.load_model_state_dict({"state_dict": plain})
    assert same(state(model), plain)
    with pytest.raises(AdapterStateError):
        t.strategy.load_model_state_dict(checkpoint, strict=False)


def removed(t: L.Trainer, model: LitTiny) -> None:
    t.fit(model, data())
    remove_adapters(model)


def failed(t: L.Trainer, model: LitTiny) -> None:
    model.configure_optimizers = stop  # type: ignore[method-assign]
    with pytest.raises(StopError):
        t.fit(model, data())
    del model.configure_optimizers


def attached(t: L.Trainer, model: LitTiny) -> None:
    t.strategy.connect(model)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("begin", [removed, failed, attached])
def test_a_file_of_a_module_without_adapters_is_lightnings_own(tmp_path: Path, begin: Any, weights_only: bool) -> None:
    t, model = trainer(tmp_path, [lora()], enable_checkpointing=False), LitTiny()
    begin(t, model)
    t.save_checkpoint(tmp_path / "a.ckpt", weights_only=weights_only)
    plain = trainer(tmp_path, enable_checkpointing=False)
    plain.fit(LitTiny(), data()) if begin is removed else plain.strategy.connect(LitTiny())
    plain.save_checkpoint(tmp_path / "b.ckpt", weights_only=weights_only)
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("a.ckpt", "b.ckpt"))
    assert list(ours) == list(theirs) and same(ours["state_dict"], state(model))
    assert ours.get("callbacks") == theirs.get("callbacks")


class Counts:
    """A method of a strategy that counts its calls, around one that was there."""

    def __init__(self, calls: "Counter[str]", name: str, inner: Any) -> None:
        self.calls, self.name, self.inner = calls, name, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls[self.name] += 1
        return self.inner(*args, **kwargs)


METHODS = (
    "load_checkpoint",
    "load_model_state_dict",
    "load_optimizer_state_dict",
    "setup",
    "setup_optimizers",
    "lightning_module_state_dict",
    "save_checkpoint",
    "training_step",
    "backward",
)


def count(strategy: Any) -> "Counter[str]":
    """Wrap the methods of a strategy, as another plugin would."""
    calls = Counter[str]()
    for name in METHODS:
        setattr(strategy, name, Counts(calls, name, getattr(strategy, name)))
    return calls


def stages(t: L.Trainer, folder: Path, model: LitTiny) -> None:
    t.fit(model, data(), data())
    t.save_checkpoint(folder / "a.ckpt")
    t.validate(model, data(), ckpt_path=folder / "a.ckpt", verbose=False)
    t.test(model, data(), verbose=False)


@pytest.mark.parametrize("when", ["before", "after"])
def test_methods_that_others_set_on_the_strategy_are_called_once_each(tmp_path: Path, when: str) -> None:
    plain = trainer(tmp_path, enable_checkpointing=False, max_epochs=1)
    expected = count(plain.strategy)
    stages(plain, tmp_path, LitTiny())
    model = LitTiny()
    t = trainer(tmp_path, [lora()], enable_checkpointing=False, max_epochs=1)
    if when == "after":  # wraps ours, which the later stages set again
        t.validate(model, data(), verbose=False)
    calls = count(t.strategy)
    stages(t, tmp_path, model)
    del expected["lightning_module_state_dict"], expected["load_model_state_dict"]  # ours take their place
    assert {name: calls[name] for name in expected} == expected
    assert files_hold_adapters_alone(tmp_path) and base_is_whole(model)


def test_a_method_that_replaces_ours_after_a_fit_gets_what_training_changed(tmp_path: Path) -> None:
    t, model, seen = trainer(tmp_path, [lora()], max_epochs=1), LitTiny(), []
    t.fit(model, data())
    t.strategy.save_checkpoint = lambda checkpoint, *_, **__: seen.append(set(held(checkpoint)))  # type: ignore[method-assign]
    for _ in range(2):
        t.test(model, data(), verbose=False)
        t.save_checkpoint(tmp_path / "a.ckpt")
    assert seen == [set(TRAINED)] * 2
    del t.strategy.save_checkpoint
    t.test(model, data(), verbose=False)
    t.save_checkpoint(tmp_path / "a.ckpt")
    assert len(seen) == 2 and set(tensors(tmp_path / "a.ckpt")) == set(TRAINED)


def test_a_pickled_strategy_is_as_it_was_and_gets_the_methods_around_those_of_others_again(tmp_path: Path) -> None:
    t, kind = trainer(tmp_path, [lora()], enable_checkpointing=False, max_epochs=1), SingleDeviceStrategy
    count(t.strategy)
    t.fit(LitTiny(), data())
    assert isinstance(t.strategy, kind) and type(t.strategy) is not kind
    for again in (pickle.loads(pickle.dumps(t)), copy.deepcopy(t)):  # as spawned processes get it
        assert type(again.strategy) is kind
        calls = again.strategy.save_checkpoint.calls
        calls.clear()
        again.test(LitTiny(), data(), verbose=False)
        again.fit_loop.max_epochs = 2
        again.fit(model := LitTiny(), data())
        again.save_checkpoint(tmp_path / "a.ckpt")
        assert calls["save_checkpoint"] == 1 and calls["setup"] == 2 and calls["training_step"] == 4
        assert files_hold_adapters_alone(tmp_path) and base_is_whole(model)


def test_a_method_that_others_set_on_the_precision_is_called_and_stays(tmp_path: Path) -> None:
    t, calls = trainer(tmp_path, [lora()], enable_checkpointing=False, max_epochs=1), Counter[str]()
    precision = t.strategy.precision_plugin
    mine = Counts(calls, "convert_module", precision.convert_module)
    precision.convert_module = mine  # type: ignore[method-assign]
    t.fit(LitTiny(), data())
    assert calls["convert_module"] == 1 and precision.convert_module is mine

"""The strategy loads and saves adapters at the right moments."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from torch import nn

from lightning_lora import AdapterStateError, LoRAConfig, StrategyError, remove_adapters
from lightning_lora.storage.stored import KEY
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategies.deepspeed import DeepSpeedMethods
from lightning_lora.training.strategies.for_strategy import overlay_strategy
from tests.support.cases import StopError, base_is_whole, files_hold_adapters_alone, held, same_parts, tensors
from tests.support.fits import ON_EXCEPTION, Fails, Stateful, Steps, fit, loaded, outcome
from tests.support.late import BornInConfigureModel, BornInSetup, Normed
from tests.support.models import TRAINED, LitTiny, X, best, data, is_plain, lora, same, state, trainer

SAVING: dict[str, dict[str, Any]] = {
    "link to the best": {"monitor": "val_loss", "save_last": "link"},
    "steps": {"save_top_k": -1, "every_n_train_steps": 3},
    "weights": {"save_top_k": -1, "save_last": True, "save_weights_only": True},
}


@pytest.mark.parametrize("saving", SAVING)
def test_each_file_holds_the_adapters_of_its_step_and_goes_on(tmp_path: Path, saving: str) -> None:
    saves = ModelCheckpoint(tmp_path / "files", "{epoch}-{step}", **SAVING[saving])
    model, _ = fit(tmp_path, lora(), steps := Steps(), saves, train=Stateful(), max_epochs=3)
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert files_hold_adapters_alone(tmp_path)
    for file in files[:: max(1, len(files) // 3)]:
        checkpoint = torch.load(file, weights_only=True)
        assert same_parts(held(checkpoint), steps.after[checkpoint["global_step"] - 1])
        if "optimizer_states" in checkpoint:
            again, t = fit(tmp_path, lora(), train=Stateful(), ckpt_path=file, max_epochs=3)
            assert same(state(again), state(model)) and t.global_step == 12
        else:
            outcome(trainer(tmp_path, [lora()]), "validate", again := LitTiny(), ckpt_path=file)
        assert base_is_whole(again)
    assert base_is_whole(model)


class Unreadable(L.LightningDataModule):  # its samples cannot be loaded any more
    def train_dataloader(self) -> Any:
        raise StopError


@pytest.mark.parametrize("kind", ON_EXCEPTION)
def test_failed_run_goes_on_from_the_file_of_its_failure(tmp_path: Path, kind: str) -> None:
    through, _ = fit(tmp_path, lora(), train=Stateful(), max_epochs=3, enable_checkpointing=False)
    failed = LitTiny()
    with pytest.raises(StopError):
        fit(tmp_path, lora(), ON_EXCEPTION[kind](tmp_path), Fails(), model=failed, train=Stateful(), max_epochs=3)
    assert files_hold_adapters_alone(tmp_path) and base_is_whole(failed)
    (file,) = tmp_path.rglob("on_exception*.ckpt")
    before, model = held(torch.load(file, weights_only=True)), LitTiny()
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path / "again")], max_epochs=3)
    with pytest.raises(StopError):  # before the first step: its file and the module keep what was trained
        t.fit(model, datamodule=Unreadable(), ckpt_path=file)
    (again,) = (tmp_path / "again").rglob("*.ckpt")
    assert same(held(torch.load(again, weights_only=True)), before)
    assert same({name: state(model)[name] for name in before}, before)
    t, resumed = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path)], max_epochs=3), LitTiny()
    t.fit(resumed, Stateful(), data(), ckpt_path=None if kind == "callback" else file)
    assert same(state(resumed), state(through)) and t.global_step == 12 and base_is_whole(resumed)
    assert file.exists() is (kind != "callback")  # it removes its file after a fit that ends


@pytest.mark.parametrize("cls", [BornInSetup, BornInConfigureModel])
def test_layers_and_weights_that_come_late(tmp_path: Path, cls: type[LitTiny]) -> None:
    expected, _ = fit(tmp_path, lora())
    model, t = fit(tmp_path, lora(), model=cls())
    t.save_checkpoint(tmp_path / "a.ckpt")
    assert is_plain(model) and sorted(tensors(tmp_path / "a.ckpt")) == sorted(TRAINED)
    torch.testing.assert_close(model(X), expected(X))
    outcome(trainer(tmp_path, [lora()]), "test", new := cls(), ckpt_path=tmp_path / "a.ckpt")
    torch.testing.assert_close(new(X), expected(X))


@pytest.mark.parametrize(("stage", "merge"), [(None, False), ("validate", "last")])
def test_a_file_read_outside_a_stage_changes_nothing_until_it_is_loaded(tmp_path: Path, stage: Any, merge: Any) -> None:
    worst = best(tmp_path, mode="max")
    model, t = fit(tmp_path, lora(merge=merge), worst, max_epochs=3)
    if stage is not None:
        getattr(t, stage)(model, data())
    before = state(model)
    checkpoint = t.strategy.load_checkpoint(worst.best_model_path)
    assert same(state(model), before) and is_plain(model) is bool(merge)
    t.strategy.load_model_state_dict(checkpoint)
    torch.testing.assert_close(model(X), loaded(worst.best_model_path)(X))
    assert is_plain(model) is bool(merge) and base_is_whole(model)
    remove_adapters(model)
    plain = state(LitTiny())
    t.strategy.load_checkpoint(worst.best_model_path)
    t.strategy.load_model_state_dict({"state_dict": plain})
    assert same(state(model), plain)
    with pytest.raises(AdapterStateError):
        t.strategy.load_model_state_dict(checkpoint, strict=False)


def test_a_file_of_a_module_without_adapters_is_lightnings_own(tmp_path: Path) -> None:
    model, t = fit(tmp_path, lora(), enable_checkpointing=False)
    remove_adapters(model)
    t.save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, enable_checkpointing=False)[1].save_checkpoint(tmp_path / "b.ckpt")
    ours, theirs = (torch.load(tmp_path / name, weights_only=True) for name in ("a.ckpt", "b.ckpt"))
    assert list(ours) == list(theirs) and same(ours["state_dict"], state(model))
    assert ours["callbacks"] == theirs["callbacks"]


LOADS = ("load_checkpoint", "load_model_state_dict", "load_optimizer_state_dict")
SAVES = ("lightning_module_state_dict", "save_checkpoint")
METHODS = (*LOADS, *SAVES, "setup", "setup_optimizers", "training_step", "backward")


def count(strategy: Any) -> dict[str, Mock]:
    """Wrap the methods of a strategy, as another plugin would."""
    calls = {name: Mock(wraps=getattr(strategy, name)) for name in METHODS}
    for name, counting in calls.items():
        setattr(strategy, name, counting)
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
    counts = [{name: found[name].call_count for name in expected} for found in (calls, expected)]
    assert counts[0] == counts[1] and counts[0]["training_step"] == 4
    assert files_hold_adapters_alone(tmp_path) and base_is_whole(model)


def test_a_method_that_replaces_ours_after_a_fit_is_below_ours_in_the_next_stage(tmp_path: Path) -> None:
    seen: list[bool] = []
    model, t = fit(tmp_path, lora(), max_epochs=1)
    t.strategy.save_checkpoint = lambda checkpoint, *_, **__: seen.append(KEY in checkpoint)  # type: ignore[method-assign]
    for _ in range(2):
        outcome(t, "test", model)
        t.save_checkpoint(tmp_path / "a.ckpt")
    assert seen == [True] * 2
    del t.strategy.save_checkpoint
    outcome(t, "test", model)
    t.save_checkpoint(tmp_path / "a.ckpt")
    assert len(seen) == 2 and set(tensors(tmp_path / "a.ckpt")) == set(TRAINED)


@pytest.mark.parametrize("when", ["before", "after"])
def test_without_the_callback_a_strategy_is_lightnings_own_again(tmp_path: Path, when: str) -> None:
    one = {"strategy": SingleDeviceStrategy(torch.device("cpu")), "accelerator": "auto", "devices": "auto"}
    calls = count(one["strategy"]) if when == "before" else {}  # other code is around its methods, or ours
    _, t = fit(tmp_path, first := lora(), **one)
    calls = calls or count(t.strategy)
    calls["training_step"].reset_mock()
    model, other = fit(tmp_path, max_epochs=1, **one)
    other.save_checkpoint(tmp_path / "a.ckpt")
    assert is_plain(model) and calls["training_step"].call_count == 4
    assert KEY not in torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(state(model), state(fit(tmp_path, max_epochs=1)[0]))
    outcome(t, "test", LitTiny())
    t.callbacks.remove(first)  # type: ignore[attr-defined]
    outcome(t, "test", model := LitTiny())
    assert is_plain(model)
    assert not is_plain(fit(tmp_path, lora(merge=False), **one)[0])


@pytest.mark.parametrize("again", [False, True], ids=["set after the fit", "a second fit after it"])
def test_what_other_code_sets_on_a_strategy_is_called_in_its_order(tmp_path: Path, again: bool) -> None:
    one = {"strategy": SingleDeviceStrategy(torch.device("cpu")), "accelerator": "auto", "devices": "auto"}
    calls = []
    for number in (1, 2):
        below = one["strategy"].save_checkpoint

        def save(*args: Any, number: int = number, below: Any = below, **kwargs: Any) -> None:
            calls.append(number)
            below(*args, **kwargs)

        one["strategy"].save_checkpoint = save
        if number == 1 or again:
            fit(tmp_path, lora(), **one)
    for callbacks in ([], [lora()], []):
        _, trainer = fit(tmp_path, *callbacks, max_epochs=1, **one)
        calls.clear()
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        assert calls == [2, 1]


# Strategies that shard the model in another way are refused by name


class DeepSpeedStrategy(SingleDeviceStrategy):  # it has what Lightning's strategy of this name has before a run
    restore_checkpoint_after_setup = True  # type: ignore[assignment]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class Renamed(DeepSpeedStrategy):
    """As in Ray, and in users' code."""


def test_zero_1_and_2_are_accepted() -> None:
    for stage in (1, 2):
        methods = overlay_strategy(Renamed({"zero_optimization": {"stage": stage}}), Stage(LoRAConfig()))
        assert isinstance(methods, DeepSpeedMethods)


class RestoresLate(SingleDeviceStrategy):
    restore_checkpoint_after_setup = True  # type: ignore[assignment]


WITHOUT_ZERO = r"DeepSpeedStrategy without ZeRO .* strategy='ddp', or ZeRO stage 1 or 2"
ZERO_3 = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: Renamed(ZERO_3), r"^Renamed with ZeRO stage 3 shards .* ModelParallelStrategy.*fully_sh"),
    (lambda: DeepSpeedStrategy(None), WITHOUT_ZERO),
    (RestoresLate, "^RestoresLate restores checkpoints after its set-up, which LoRACallback does not support"),
    (FSDPStrategy, r"^FSDPStrategy shards .* ModelParallelStrategy.*fully_shard\("),
]


@pytest.mark.parametrize(("make", "match"), REFUSED)
def test_a_strategy_that_shards_otherwise_is_refused(make: Callable[[], Any], match: str) -> None:
    strategy = make()
    kind = type(strategy)
    with pytest.raises(StrategyError, match=f"(?s){match}"):
        overlay_strategy(strategy, Stage(LoRAConfig()))
    assert type(strategy) is kind


def test_nothing_changes_before_a_strategy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StrategyError, match="Renamed with ZeRO stage 3"):
        fit(tmp_path, lora(), model=(model := LitTiny()), strategy=Renamed(ZERO_3))
    assert is_plain(model) and same(state(model), state(LitTiny()))


class Replaced(nn.BatchNorm1d):
    """What takes a norm's place; torch's own SyncBatchNorm runs on a GPU alone."""


class Synchronises(LayerSync):
    """What ``sync_batchnorm=True`` is: it puts new norms in place of those that are there, with their tensors."""

    def apply(self, model: nn.Module) -> nn.Module:
        for name, norm in list(model.named_modules()):
            if isinstance(norm, nn.BatchNorm1d):
                new = Replaced(norm.num_features)
                for kind in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
                    setattr(new, kind, getattr(norm, kind))
                model.set_submodule(name, new.train(norm.training))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model


class LooksAtNorm(L.Callback):  # looks in every process
    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert isinstance(pl_module.norm, Replaced) and not pl_module.norm.weight.requires_grad
        assert same(state(pl_module.norm), state(Normed().norm))


@pytest.mark.processes
def test_a_frozen_norm_stands_still_when_it_is_made_a_synchronised_one(tmp_path: Path) -> None:
    options = {"strategy": "ddp_fork", "devices": 2, "plugins": [Synchronises()]}
    model, _ = fit(tmp_path, lora(), LooksAtNorm(), model=Normed(), **options)
    assert same(state(model.norm), state(Normed().norm))
    assert not torch.equal(model.q_proj.weight, Normed().q_proj.weight)

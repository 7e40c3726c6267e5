"""The strategy loads and saves adapters at the right moments."""

import pickle
from collections.abc import Callable
from copy import deepcopy
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
from lightning_lora.training.compatibility import states_are_read
from lightning_lora.training.stages.stage import Stage
from lightning_lora.training.strategies.checkpoint_files import read_checkpoint
from lightning_lora.training.strategies.deepspeed import DeepSpeedMethods
from lightning_lora.training.strategies.for_strategy import methods_of, patch_strategy
from tests.support.cases import (
    StopError,
    base_is_whole,
    files_hold_adapters_alone,
    held,
    same_parts,
    tensors,
)
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.fits import (
    ON_EXCEPTION,
    Fails,
    Stateful,
    Steps,
    fit,
    loaded,
    outcome,
)
from tests.support.late import BornInConfigureModel, BornInSetup, Normed
from tests.support.models import (
    TRAINED,
    LitTiny,
    X,
    best,
    data,
    is_plain,
    lora,
    state,
    trainer,
)


def read(file: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(file, weights_only=True)
    return checkpoint


def state_in(file: Path) -> dict[str, Any]:
    """What trains, as a file has it."""
    return held(read(file))


# Files of a run


SAVING: dict[str, dict[str, Any]] = {
    "link to the best": {"monitor": "val_loss", "save_last": "link"},
    "steps": {"save_top_k": -1, "every_n_train_steps": 3},
    "weights": {"save_top_k": -1, "save_last": True, "save_weights_only": True},
}


def some_of(files: list[Path]) -> list[Path]:
    """About three of many."""
    step = max(1, len(files) // 3)
    return files[::step]


@pytest.mark.parametrize("saving", SAVING)
def test_each_file_holds_the_adapters_of_its_step_and_goes_on(
    tmp_path: Path, saving: str
) -> None:
    saves = ModelCheckpoint(tmp_path / "files", "{epoch}-{step}", **SAVING[saving])
    steps = Steps()
    model, _ = fit(tmp_path, lora(), steps, saves, train=Stateful(), max_epochs=3)
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert files
    assert files_hold_adapters_alone(tmp_path)
    for file in some_of(files):
        checkpoint = read(file)
        at_its_step = steps.after[checkpoint["global_step"] - 1]
        assert same_parts(held(checkpoint), at_its_step)
        if "optimizer_states" in checkpoint:
            again, t = fit(
                tmp_path, lora(), train=Stateful(), ckpt_path=file, max_epochs=3
            )
            assert_same_tensors(state(again), state(model))
            assert t.global_step == 12
        else:
            again = LitTiny()
            outcome(trainer(tmp_path, [lora()]), "validate", again, ckpt_path=file)
        assert base_is_whole(again)
    assert base_is_whole(model)


class Unreadable(L.LightningDataModule):
    """Its samples cannot be loaded any more."""

    def train_dataloader(self) -> Any:
        raise StopError


def file_of_a_failed_run(folder: Path, kind: str) -> Path:
    """The file of a run that has failed after its sixth step."""
    failed = LitTiny()
    with pytest.raises(StopError):
        fit(
            folder,
            lora(),
            ON_EXCEPTION[kind](folder),
            Fails(),
            model=failed,
            train=Stateful(),
            max_epochs=3,
        )
    assert files_hold_adapters_alone(folder)
    assert base_is_whole(failed)
    (file,) = folder.rglob("on_exception*.ckpt")
    return file


@pytest.mark.parametrize("kind", ON_EXCEPTION)
def test_failed_run_goes_on_from_the_file_of_its_failure(
    tmp_path: Path, kind: str
) -> None:
    through, _ = fit(
        tmp_path, lora(), train=Stateful(), max_epochs=3, enable_checkpointing=False
    )
    file = file_of_a_failed_run(tmp_path, kind)
    resumed = LitTiny()
    t = trainer(tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path)], max_epochs=3)
    is_found_by_lightning = kind == "callback"
    ckpt_path = None if is_found_by_lightning else file
    t.fit(resumed, Stateful(), data(), ckpt_path=ckpt_path)
    assert_same_tensors(state(resumed), state(through))
    assert t.global_step == 12
    assert base_is_whole(resumed)
    # it removes its file after a fit that ends
    assert file.exists() is not is_found_by_lightning


@pytest.mark.parametrize("kind", ON_EXCEPTION)
def test_a_run_that_fails_before_its_first_step_keeps_what_was_trained(
    tmp_path: Path, kind: str
) -> None:
    before = state_in(file_of_a_failed_run(tmp_path, kind))
    (file,) = tmp_path.rglob("on_exception*.ckpt")
    model = LitTiny()
    t = trainer(
        tmp_path, [lora(), ON_EXCEPTION[kind](tmp_path / "again")], max_epochs=3
    )
    with pytest.raises(StopError):
        t.fit(model, datamodule=Unreadable(), ckpt_path=file)
    (again,) = (tmp_path / "again").rglob("*.ckpt")
    assert_same_tensors(state_in(again), before)
    assert_holds(state(model), before)


@pytest.mark.parametrize("cls", [BornInSetup, BornInConfigureModel])
def test_layers_and_weights_that_come_late(tmp_path: Path, cls: type[LitTiny]) -> None:
    file = tmp_path / "a.ckpt"
    expected, _ = fit(tmp_path, lora())
    model, t = fit(tmp_path, lora(), model=cls())
    t.save_checkpoint(file)
    assert is_plain(model)
    assert sorted(tensors(file)) == sorted(TRAINED)
    torch.testing.assert_close(model(X), expected(X))
    new = cls()
    outcome(trainer(tmp_path, [lora()]), "test", new, ckpt_path=file)
    torch.testing.assert_close(new(X), expected(X))


@pytest.mark.parametrize(("stage", "merge"), [(None, False), ("validate", "last")])
def test_a_file_read_outside_a_stage_changes_nothing_until_it_is_loaded(
    tmp_path: Path, stage: Any, merge: Any
) -> None:
    worst = best(tmp_path, mode="max")
    model, t = fit(tmp_path, lora(merge=merge), worst, max_epochs=3)
    if stage is not None:
        getattr(t, stage)(model, data())
    before = state(model)
    checkpoint = t.strategy.load_checkpoint(worst.best_model_path)
    assert_same_tensors(state(model), before)
    assert is_plain(model) is bool(merge)
    t.strategy.load_model_state_dict(checkpoint)
    expected = loaded(worst.best_model_path)
    torch.testing.assert_close(model(X), expected(X))
    assert is_plain(model) is bool(merge)
    assert base_is_whole(model)
    remove_adapters(model)
    plain = state(LitTiny())
    t.strategy.load_checkpoint(worst.best_model_path)
    t.strategy.load_model_state_dict({"state_dict": plain})
    assert_same_tensors(state(model), plain)
    with pytest.raises(AdapterStateError):
        t.strategy.load_model_state_dict(checkpoint, strict=False)


def test_a_file_of_a_module_without_adapters_is_lightnings_own(tmp_path: Path) -> None:
    model, t = fit(tmp_path, lora(), enable_checkpointing=False)
    remove_adapters(model)
    t.save_checkpoint(tmp_path / "a.ckpt")
    _, plain = fit(tmp_path, enable_checkpointing=False)
    plain.save_checkpoint(tmp_path / "b.ckpt")
    ours = read(tmp_path / "a.ckpt")
    theirs = read(tmp_path / "b.ckpt")
    assert list(ours) == list(theirs)
    assert_same_tensors(ours["state_dict"], state(model))
    assert ours["callbacks"] == theirs["callbacks"]


# Methods that other code sets on a strategy


METHODS = (
    "load_checkpoint",
    "load_model_state_dict",
    "load_optimizer_state_dict",
    "lightning_module_state_dict",
    "save_checkpoint",
    "setup",
    "setup_optimizers",
    "training_step",
    "backward",
)
REPLACED_BY_OURS = ("lightning_module_state_dict", "load_model_state_dict")


class Calls:
    """Wraps the methods of a strategy, as another plugin would, and counts their calls."""

    def __init__(self, strategy: Any) -> None:
        self.of: dict[str, Mock] = {}
        for name in METHODS:
            counting = Mock(wraps=getattr(strategy, name))
            self.of[name] = counting
            setattr(strategy, name, counting)

    def counts(self) -> dict[str, int]:
        """How often each was called that ours do not take the place of."""
        counts = {name: counting.call_count for name, counting in self.of.items()}
        for name in REPLACED_BY_OURS:
            del counts[name]
        return counts


def run_all_stages(t: L.Trainer, folder: Path, model: LitTiny) -> None:
    file = folder / "a.ckpt"
    t.fit(model, data(), data())
    t.save_checkpoint(file)
    t.validate(model, data(), ckpt_path=file, verbose=False)
    t.test(model, data(), verbose=False)


@pytest.mark.parametrize("when", ["before", "after"])
def test_methods_that_others_set_on_the_strategy_are_called_once_each(
    tmp_path: Path, when: str
) -> None:
    plain = trainer(tmp_path, enable_checkpointing=False, max_epochs=1)
    expected = Calls(plain.strategy)
    run_all_stages(plain, tmp_path, LitTiny())
    model = LitTiny()
    t = trainer(tmp_path, [lora()], enable_checkpointing=False, max_epochs=1)
    if when == "after":  # wraps ours, which the later stages set again
        t.validate(model, data(), verbose=False)
    calls = Calls(t.strategy)
    run_all_stages(t, tmp_path, model)
    assert calls.counts() == expected.counts()
    assert calls.counts()["training_step"] == 4
    assert files_hold_adapters_alone(tmp_path)
    assert base_is_whole(model)


def test_a_method_that_replaces_ours_after_a_fit_is_below_ours_in_the_next_stage(
    tmp_path: Path,
) -> None:
    file = tmp_path / "a.ckpt"
    seen: list[bool] = []

    def save_checkpoint(checkpoint: Any, *_: Any, **__: Any) -> None:
        seen.append(KEY in checkpoint)

    model, t = fit(tmp_path, lora(), max_epochs=1)
    t.strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
    for _ in range(2):
        outcome(t, "test", model)
        t.save_checkpoint(file)
    assert seen == [True, True]
    del t.strategy.save_checkpoint
    outcome(t, "test", model)
    t.save_checkpoint(file)
    assert len(seen) == 2
    assert set(tensors(file)) == set(TRAINED)


def one_strategy_for_all() -> dict[str, Any]:
    """Options of Trainers that share a strategy."""
    return {
        "strategy": SingleDeviceStrategy(torch.device("cpu")),
        "accelerator": "auto",
        "devices": "auto",
    }


@pytest.mark.parametrize("when", ["before", "after"])
def test_without_the_callback_a_strategy_is_lightnings_own_again(
    tmp_path: Path, when: str
) -> None:
    file = tmp_path / "a.ckpt"
    shared = one_strategy_for_all()
    first = lora()
    if when == "before":  # other code is around its methods
        calls = Calls(shared["strategy"])
    _, t = fit(tmp_path, first, **shared)
    if when == "after":  # or around ours
        calls = Calls(t.strategy)
    calls.of["training_step"].reset_mock()
    model, other = fit(tmp_path, max_epochs=1, **shared)
    other.save_checkpoint(file)
    assert is_plain(model)
    assert calls.of["training_step"].call_count == 4
    assert KEY not in read(file)
    plain, _ = fit(tmp_path, max_epochs=1)
    assert_same_tensors(state(model), state(plain))
    outcome(t, "test", LitTiny())
    t.callbacks.remove(first)  # type: ignore[attr-defined]
    model = LitTiny()
    outcome(t, "test", model)
    assert is_plain(model)
    adapted, _ = fit(tmp_path, lora(merge=False), **shared)
    assert not is_plain(adapted)


def wrap_saving(strategy: Any, number: int, calls: list[int]) -> None:
    """Let a strategy note this number whenever it saves."""
    below = strategy.save_checkpoint

    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        calls.append(number)
        below(*args, **kwargs)

    strategy.save_checkpoint = save_checkpoint


@pytest.mark.parametrize(
    "again", [False, True], ids=["set after the fit", "a second fit after it"]
)
def test_what_other_code_sets_on_a_strategy_is_called_in_its_order(
    tmp_path: Path, again: bool
) -> None:
    shared = one_strategy_for_all()
    calls: list[int] = []
    wrap_saving(shared["strategy"], 1, calls)
    fit(tmp_path, lora(), **shared)
    wrap_saving(shared["strategy"], 2, calls)
    if again:
        fit(tmp_path, lora(), **shared)
    for callbacks in ([], [lora()], []):
        _, t = fit(tmp_path, *callbacks, max_epochs=1, **shared)
        calls.clear()
        t.save_checkpoint(tmp_path / "a.ckpt")
        assert calls == [2, 1]


# Strategies that shard the model in another way are refused by name


def test_a_copied_strategy_is_as_it_was_and_takes_the_methods_again(
    tmp_path: Path,
) -> None:
    _, t = fit(tmp_path, lora(), max_epochs=1)
    for copied in (deepcopy(t.strategy), pickle.loads(pickle.dumps(t.strategy))):
        assert methods_of(copied) is None
        assert copied.training_step.__self__ is copied
        methods = patch_strategy(copied, Stage(LoRAConfig()))
        assert methods.strategy is copied
        assert not methods.is_by_other_code("training_step")


class RestoresLate(SingleDeviceStrategy):
    restore_checkpoint_after_setup = True  # type: ignore[assignment]


class DeepSpeedStrategy(RestoresLate):
    """It has what Lightning's strategy of this name has before a run."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class Renamed(DeepSpeedStrategy):
    """As in Ray, and in users' code."""


def of_stage(stage: int) -> Any:
    return Renamed({"zero_optimization": {"stage": stage}})


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_are_accepted(stage: int) -> None:
    methods = patch_strategy(of_stage(stage), Stage(LoRAConfig()))
    assert isinstance(methods, DeepSpeedMethods)


def of_stage_3() -> Any:
    offload = {"device": "cpu"}
    return Renamed({"zero_optimization": {"stage": 3, "offload_param": offload}})


def without_zero() -> Any:
    return DeepSpeedStrategy({})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            of_stage_3,
            r"^Renamed with ZeRO stage 3 shards .* ModelParallelStrategy.*fully_sh",
        ),
        (
            without_zero,
            r"DeepSpeedStrategy without ZeRO .* strategy='ddp', or ZeRO stage 1 or 2",
        ),
        (
            RestoresLate,
            "^RestoresLate restores checkpoints after its set-up, which LoRACallback "
            "does not support",
        ),
        (FSDPStrategy, r"^FSDPStrategy shards .* ModelParallelStrategy.*fully_shard\("),
    ],
)
def test_a_strategy_that_shards_otherwise_is_refused(
    make: Callable[[], Any], match: str
) -> None:
    strategy = make()
    kind = type(strategy)
    with pytest.raises(StrategyError, match=f"(?s){match}"):
        patch_strategy(strategy, Stage(LoRAConfig()))
    assert type(strategy) is kind


def test_nothing_changes_before_a_strategy_is_refused(tmp_path: Path) -> None:
    model = LitTiny()
    with pytest.raises(StrategyError, match="Renamed with ZeRO stage 3"):
        fit(tmp_path, lora(), model=model, strategy=of_stage_3())
    assert is_plain(model)
    assert_same_tensors(state(model), state(LitTiny()))


# Norms that are replaced by synchronised ones


class Replaced(nn.BatchNorm1d):
    """What takes a norm's place; torch's own SyncBatchNorm runs on a GPU alone."""


class Synchronises(LayerSync):
    """What ``sync_batchnorm=True`` is: it puts new norms in place of those that are there, with their tensors."""

    def apply(self, model: nn.Module) -> nn.Module:
        for name, norm in list(model.named_modules()):
            if isinstance(norm, nn.BatchNorm1d):
                model.set_submodule(name, self.replacement(norm))
        return model

    def replacement(self, norm: nn.BatchNorm1d) -> Replaced:
        new = Replaced(norm.num_features)
        new.weight = norm.weight
        new.bias = norm.bias
        new.running_mean = norm.running_mean
        new.running_var = norm.running_var
        new.num_batches_tracked = norm.num_batches_tracked
        return new.train(norm.training)

    def revert(self, model: nn.Module) -> nn.Module:
        return model


def assert_norm_is_as_it_came(model: Any) -> None:
    assert_same_tensors(state(model.norm), state(Normed().norm))


class LooksAtNorm(L.Callback):
    """Looks in every process."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert isinstance(pl_module.norm, Replaced)
        assert not pl_module.norm.weight.requires_grad
        assert_norm_is_as_it_came(pl_module)


@pytest.mark.processes
def test_a_frozen_norm_stands_still_when_it_is_made_a_synchronised_one(
    tmp_path: Path,
) -> None:
    model, _ = fit(
        tmp_path,
        lora(),
        LooksAtNorm(),
        model=Normed(),
        strategy="ddp_fork",
        devices=2,
        plugins=[Synchronises()],
    )
    assert_norm_is_as_it_came(model)
    assert not torch.equal(model.q_proj.weight, Normed().q_proj.weight)


@pytest.mark.parametrize("knows", [True, False])
def test_a_strategy_that_can_be_told_reads_plain_types_only(
    tmp_path: Path, knows: bool
) -> None:
    told = []

    class Knows(SingleDeviceStrategy):
        def load_checkpoint(
            self, checkpoint_path: Any, weights_only: Any = None
        ) -> Any:
            told.append(weights_only)
            return torch.load(checkpoint_path, weights_only=True)

    class Plain(SingleDeviceStrategy):
        # as before Lightning 2.6
        def load_checkpoint(self, checkpoint_path: Any) -> Any:
            return torch.load(checkpoint_path, weights_only=True)

    kind = Knows if knows else Plain
    _, t = fit(tmp_path, lora())
    t.save_checkpoint(tmp_path / "a.ckpt")
    methods = Mock(strategy=kind("cpu"), original=kind("cpu"))
    methods.is_by_other_code.return_value = False
    assert KEY in read_checkpoint(methods, tmp_path / "a.ckpt")
    assert told == [True] * knows


def test_callbacks_that_read_checkpoints_are_known() -> None:
    class Reads(L.Callback):
        def on_load_checkpoint(self, *_: Any) -> None:
            """Read something."""

    class Inherits(Reads):
        pass

    assert states_are_read([L.Callback(), Inherits()])
    assert not states_are_read([L.Callback(), ModelCheckpoint(), lora()])

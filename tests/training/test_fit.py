"""One line in a Trainer: what trains, what is written, what is merged, and that no later stage is wrong."""

import copy
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    AdapterStateError,
    BestCheckpointWarning,
    ConfigError,
    DeadAdapterWarning,
    LoRACallback,
    LoRAConfig,
    LoRAWarning,
    StrategyError,
    TargetError,
    adapter_state_dict,
    disable_adapters,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    summarize,
    unmerge_adapters,
)
from lightning_lora.layers import LoRALayer
from tests.models import ADAPTERS, TRAINED, WIDTH, WORDS, LitTiny, best, data, is_plain, lora, same, state, trainer

X = torch.arange(WORDS)


def tensors(path: Any) -> list[str]:
    """Names in a checkpoint's state."""
    return list(torch.load(path, weights_only=True)["state_dict"])


class At(L.Callback):
    """Do something at the start of a given training batch."""

    def __init__(self, batch: int, action: Callable[[L.Trainer, L.LightningModule], Any]) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.batch:
            self.action(trainer, pl_module)


class StopError(RuntimeError):
    pass


def stop(*_: Any) -> None:
    raise StopError


# What trains


def test_only_adapters_and_modules_to_save_change(tmp_path: Path) -> None:
    model = LitTiny()
    before = state(model)
    trainer(tmp_path, [lora(merge=False)]).fit(model, data(), data())
    after = state(model)
    assert [name for name in before if not torch.equal(after[name], before[name])] == ["head.weight", "head.bias"]
    assert all(after[name].abs().sum() > 0 for name in ADAPTERS)


def test_training_is_that_of_adapters_trained_by_hand(tmp_path: Path) -> None:
    torch.manual_seed(5)
    by_hand = LitTiny()
    inject_adapters(by_hand, LoRAConfig(r=2, modules_to_save=["head"]))
    optimizer = torch.optim.AdamW([p for p in by_hand.parameters() if p.requires_grad], lr=0.05)
    for batch in [*data(), *data()]:
        optimizer.zero_grad()
        by_hand.loss(batch).backward()
        optimizer.step()
    torch.manual_seed(5)
    model = LitTiny()
    trainer(tmp_path, [lora(merge=False)]).fit(model, data())
    torch.testing.assert_close(state(model), state(by_hand))


def test_after_fit_the_module_is_plain_and_computes_as_adapted(tmp_path: Path) -> None:
    adapted, merged = LitTiny(), LitTiny()
    keys, flags = list(merged.state_dict()), [p.requires_grad for p in merged.parameters()]
    for model, merge in ((adapted, False), (merged, "last")):
        torch.manual_seed(5)
        trainer(tmp_path, [lora(merge=merge)]).fit(model, data())
    assert is_plain(merged) and type(merged.q_proj) is nn.Linear
    assert list(merged.state_dict()) == keys and [p.requires_grad for p in merged.parameters()] == flags
    torch.testing.assert_close(merged(X), adapted(X))
    assert not torch.equal(merged(X), LitTiny()(X))


class BornInSetup(LitTiny):
    """A module whose projections are made in ``setup``."""

    def __init__(self) -> None:
        super().__init__()
        del self.q_proj, self.v_proj

    def make(self) -> None:
        if not hasattr(self, "q_proj"):
            other = LitTiny()
            self.q_proj, self.v_proj = other.q_proj, other.v_proj

    def setup(self, stage: str) -> None:
        self.make()


class BornInConfigureModel(BornInSetup):
    """A module whose projections are made in ``configure_model``."""

    def setup(self, stage: str) -> None:
        pass

    def configure_model(self) -> None:
        self.make()


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


class NoLinear(LitTiny):
    """A module with nothing to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = self.v_proj = self.head = nn.Identity()  # type: ignore[assignment]


def test_nothing_to_adapt_is_an_error_and_never_a_full_fine_tune(tmp_path: Path) -> None:
    model = NoLinear()
    before = state(model)
    with pytest.raises(TargetError, match="NoLinear"):
        trainer(tmp_path, [LoRACallback(r=1)]).fit(model, data())
    assert same(state(model), before)
    with pytest.raises(TargetError, match="'q_proj'"):
        trainer(tmp_path, [LoRACallback(r=1, target_modules=["q_porj"])]).fit(LitTiny(), data())


# What is written


def test_every_file_is_adapter_only_and_loads_safely(tmp_path: Path) -> None:
    saves = At(2, lambda t, m: t.save_checkpoint(tmp_path / "during.ckpt"))
    light = At(3, lambda t, m: t.save_checkpoint(tmp_path / "light.ckpt", weights_only=True))
    fail = At(7, stop)
    t = trainer(
        tmp_path,
        [
            lora(),
            saves,
            light,
            fail,
            best(tmp_path / "top", save_top_k=2, save_last=True),
            ModelCheckpoint(tmp_path / "weights", save_weights_only=True, every_n_train_steps=2),
            OnExceptionCheckpoint(tmp_path, "failed"),
        ],
    )
    with pytest.raises(StopError):
        t.fit(LitTiny(), data(), data())
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert {file.name for file in files} >= {
        "during.ckpt",
        "light.ckpt",
        "failed.ckpt",
        "last.ckpt",
        "best-epoch=0.ckpt",
    }
    assert any(file.parent.name == "weights" for file in files)
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert sorted(checkpoint["state_dict"]) == sorted(TRAINED), file
        assert checkpoint["lightning_lora"]["format"] == 2
        for optimizer in checkpoint.get("optimizer_states", []):
            assert len(optimizer["param_groups"][0]["params"]) == len(TRAINED)


def test_files_after_fit_are_adapter_only_and_resume(tmp_path: Path) -> None:
    model = LitTiny()
    t = trainer(tmp_path, [lora()])
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "after.ckpt")
    t.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    assert sorted(tensors(tmp_path / "after.ckpt")) == sorted(tensors(tmp_path / "light.ckpt")) == sorted(TRAINED)
    assert is_plain(model)
    new = LitTiny()
    trainer(tmp_path, [lora()], max_epochs=2).fit(new, data(), ckpt_path=tmp_path / "after.ckpt")
    torch.testing.assert_close(new(X), model(X))


class Big(LitTiny):
    """A module whose adapters are a small part of it."""

    def __init__(self) -> None:
        super().__init__(width=512)


def test_a_checkpoint_is_adapters_and_their_optimizer_state_and_little_more(tmp_path: Path) -> None:
    model = Big()
    t = trainer(tmp_path, [LoRACallback(r=8, target_modules=["q_proj", "v_proj"])], max_epochs=1)
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "after.ckpt")
    adapters = sum(value.nbytes for value in adapter_state_dict(model).values())
    assert adapters == 4 * 2 * 8 * 2 * 512  # fp32, two layers, r, in + out
    assert (tmp_path / "after.ckpt").stat().st_size < 3 * adapters + 16_000
    assert sum(p.nbytes for p in model.parameters()) > 20 * adapters


# What is merged, and what later stages see


def test_a_weight_that_is_part_of_a_larger_tensor_goes_alone_into_the_file(tmp_path: Path) -> None:
    """As those of a recurrent layer are on a GPU: torch would write the larger one."""
    model = LitTiny()
    model.head.weight.data = torch.randn(1 << 20)[: model.head.weight.numel()].view_as(model.head.weight)
    t = trainer(tmp_path, [lora(merge=False)], enable_checkpointing=False)
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert (tmp_path / "a.ckpt").stat().st_size < 20_000
    assert torch.equal(torch.load(tmp_path / "a.ckpt")["state_dict"]["head.weight"], model.head.weight)


def test_best_and_last_give_their_own_numbers_after_fit(tmp_path: Path) -> None:
    model, checkpoint = (
        LitTiny(lr=0.5),
        best(tmp_path, save_last=True, save_top_k=-1, mode="max"),
    )  # the worst: surely not the last
    t = trainer(tmp_path, [lora(), checkpoint], max_epochs=4)
    t.fit(model, data(), data())
    last = t.callback_metrics["val_loss"].item()
    last_path = checkpoint.last_model_path
    worst = checkpoint.best_model_score.item()  # type: ignore[union-attr]
    assert worst > last
    assert t.validate(model, data(), verbose=False)[0]["val_loss"] == pytest.approx(last)
    assert t.test(model, data(), ckpt_path="best", verbose=False)[0]["test_loss"] == pytest.approx(worst)
    assert is_plain(model)
    assert t.test(model, data(), verbose=False)[0]["test_loss"] == pytest.approx(
        worst
    )  # as plain Lightning: loaded stays
    assert t.test(model, data(), ckpt_path="last", verbose=False)[0]["test_loss"] == pytest.approx(last)
    assert t.validate(dataloaders=data(), verbose=False)[0]["val_loss"] == pytest.approx(worst)  # no model means best
    predicted = t.predict(model, data(), ckpt_path=last_path)
    torch.testing.assert_close(torch.cat(predicted), model(torch.cat([x for x, _ in data()])))  # type: ignore[arg-type]


def test_new_trainer_and_new_callback_meet_a_merged_model(tmp_path: Path) -> None:
    model, checkpoint = LitTiny(), best(tmp_path)
    t = trainer(tmp_path, [lora(), checkpoint])
    t.fit(model, data(), data())
    score = pytest.approx(checkpoint.best_model_score.item())  # type: ignore[union-attr]
    path = checkpoint.best_model_path
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), LitTiny()):
        assert trainer(tmp_path, [lora()]).test(each, data(), ckpt_path=path, verbose=False)[0]["test_loss"] == score
    load_adapter(model, path)
    assert trainer(tmp_path).test(model, data(), verbose=False)[0]["test_loss"] == score


def test_second_fit_goes_on_from_the_first(tmp_path: Path) -> None:
    once, twice = LitTiny(), LitTiny()
    for model, epochs in ((once, [4]), (twice, [2, 2])):
        torch.manual_seed(5)
        model.configure_optimizers = lambda model=model: torch.optim.SGD(model.parameters(), 0.1)  # type: ignore[method-assign]
        t = trainer(tmp_path, [lora()], max_epochs=0)
        for number in epochs:
            t.fit_loop.max_epochs += number  # type: ignore[operator]
            t.fit(model, data())
    torch.testing.assert_close(twice(X), once(X), atol=1e-6, rtol=1e-6)
    unmerge_adapters(twice)
    assert torch.equal(twice.q_proj.weight, LitTiny().q_proj.weight)


@pytest.mark.parametrize("merge", ["last", "best"])
def test_merge_says_which_adapters_the_module_ends_with(tmp_path: Path, merge: Any) -> None:
    model, checkpoint = LitTiny(lr=0.5), best(tmp_path, mode="max")
    t = trainer(tmp_path, [lora(merge=merge), checkpoint], max_epochs=4)
    t.fit(model, data(), data())
    expected = t.callback_metrics["val_loss"] if merge == "last" else checkpoint.best_model_score
    loss = trainer(tmp_path).validate(model, data(), verbose=False)[0]["val_loss"]
    assert loss == pytest.approx(expected.item())  # type: ignore[union-attr]


def test_merge_best_without_a_best_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ModelCheckpoint"):
        trainer(tmp_path, [lora(merge="best")], enable_checkpointing=False).fit(LitTiny(), data())
    with pytest.raises(ConfigError, match="with a monitor"):
        trainer(tmp_path, [lora(merge="best"), ModelCheckpoint(tmp_path)]).fit(LitTiny(), data())
    for callbacks in (
        [best(tmp_path, save_top_k=0)],
        [best(tmp_path), At(7, lambda t, m: [path.unlink() for path in tmp_path.glob("*.ckpt")])],
    ):
        model = LitTiny(lr=0 if len(callbacks) > 1 else 0.05)
        with pytest.warns(BestCheckpointWarning):
            trainer(tmp_path, [lora(merge="best"), *callbacks]).fit(model, data(), data())
        assert is_plain(model)


def test_no_merge_in_a_fast_dev_run_after_an_exception_or_if_not_wanted(tmp_path: Path) -> None:
    for callbacks, options in (([lora()], {"fast_dev_run": 2}), ([lora(merge=False)], {}), ([lora(), At(2, stop)], {})):
        model = LitTiny()
        with suppress(StopError):
            trainer(tmp_path, callbacks, **options).fit(model, data(), data())
        assert isinstance(model.q_proj, LoRALayer)
        assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)


def test_training_goes_on_after_an_exception(tmp_path: Path) -> None:
    model = LitTiny()
    t = trainer(tmp_path, [lora(), At(2, stop)])
    with pytest.raises(StopError):
        t.fit(model, data())
    t.save_checkpoint(tmp_path / "failed.ckpt")
    assert sorted(tensors(tmp_path / "failed.ckpt")) == sorted(TRAINED)
    trainer(tmp_path, [lora()]).fit(model, data())
    assert is_plain(model)


class Broken(LitTiny):
    """A module whose test fails."""

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        raise StopError


def test_failed_stage_gives_the_module_back_as_it_came(tmp_path: Path) -> None:
    (tmp_path / "cut.ckpt").write_bytes(b"PK")
    model = Broken()
    t = trainer(tmp_path, [lora()])
    for options, error in (({"ckpt_path": tmp_path / "cut.ckpt"}, AdapterFileError), ({}, StopError)):
        for stage in ("test", "fit") if options else ("test",):
            before = state(model)
            with pytest.raises(error):
                getattr(t, stage)(model, data(), **options)
            assert is_plain(model) and same(state(model), before) and all(p.requires_grad for p in model.parameters())
    t.fit(model.train(), data())  # Lightning leaves a module in eval mode when its test fails
    merged = state(model)
    for options, error in (({"ckpt_path": tmp_path / "cut.ckpt"}, AdapterFileError), ({}, StopError)):
        with pytest.raises(error):
            t.test(model, data(), **options)
        assert is_plain(model) and same(state(model), merged)
    with pytest.raises(TargetError):
        trainer(tmp_path, [lora(target_modules=["nope"])]).validate(model, data())
    assert is_plain(model) and same(state(model), merged)
    t.validate(model, data(), verbose=False)
    unmerge_adapters(model)
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)


class FailsToPrepare(LitTiny):
    """A module whose data are not there, when asked to."""

    missing = False

    def prepare_data(self) -> None:
        if self.missing:
            raise StopError


def test_a_stage_that_fails_before_it_is_set_up_changes_nothing(tmp_path: Path) -> None:
    model, t = FailsToPrepare(), trainer(tmp_path, [lora(merge=False)])
    t.validate(model, data(), verbose=False)
    inject_adapters(model, lora().config)
    model.missing = True
    with pytest.raises(StopError):
        t.test(model, data())
    assert not is_plain(model)


class Capped(LitTiny):
    """A module whose frozen embedding rescales its own rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.max_norm = 0.5


def test_an_embedding_that_rescales_itself_does_not_count_as_changed(tmp_path: Path) -> None:
    model, checkpoint = Capped(), best(tmp_path)
    trainer(tmp_path, [lora(merge="best"), checkpoint]).fit(model, data(), data())
    again = Capped()
    load_adapter(again, checkpoint.best_model_path)
    torch.testing.assert_close(again(X), model(X))


def test_learning_rate_finder_leaves_the_users_seed(tmp_path: Path) -> None:
    callback, model = lora(), LitTiny()
    t = trainer(tmp_path, [callback])
    Tuner(t).lr_find(model, data(), num_training=3, update_attr=False)
    seen: list[int] = []
    t.callbacks.append(At(0, lambda *_: seen.append(torch.initial_seed())))  # type: ignore[attr-defined]
    torch.manual_seed(123)
    t.fit(model, data())
    assert seen == [123]


@pytest.mark.parametrize("change", ["load", "cast there and back", "prune"])
def test_adapters_of_replaced_weights_are_not_spoken_for(tmp_path: Path, change: str) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora()]).fit(model, data())
    if change == "load":
        model.load_state_dict(LitTiny().state_dict())
    elif change == "cast there and back":
        model.bfloat16().float()
    else:
        torch.nn.utils.prune.l1_unstructured(model.q_proj, "weight", 0.5)
    for call in (unmerge_adapters, adapter_state_dict, lambda m: save_adapter(m, tmp_path / "a.safetensors")):
        with pytest.raises(AdapterStateError, match="changed since its adapters were merged"):
            call(model)
    with pytest.raises(AdapterStateError), disable_adapters(model):
        pass
    remove_adapters(model)


def test_learning_rate_finder_leaves_no_trace(tmp_path: Path) -> None:
    found, plain = LitTiny(), LitTiny()
    for model in (found, plain):
        torch.manual_seed(5)
        t = trainer(tmp_path, [lora()])
        if model is found:
            Tuner(t).lr_find(model, data(), num_training=5, update_attr=False)
            assert isinstance(model.q_proj, LoRALayer) and not model.q_proj.lora_B.any()
        t.fit(model, data())
    torch.testing.assert_close(found(X), plain(X))
    assert is_plain(found)


def test_stages_before_fit_change_nothing(tmp_path: Path) -> None:
    model, t = LitTiny(), trainer(tmp_path, [lora()])
    base = trainer(tmp_path).validate(LitTiny(), data(), verbose=False)
    for _ in range(2):
        assert t.validate(model, data(), verbose=False) == base
    t.predict(model, data())
    t.fit(model, data())
    assert is_plain(model)


def test_weights_replaced_after_a_merge_are_a_new_base(tmp_path: Path) -> None:
    model, checkpoint = LitTiny(), best(tmp_path)
    t = trainer(tmp_path, [lora(), checkpoint])
    t.fit(model, data(), data())
    model.load_state_dict(LitTiny().state_dict())
    with pytest.warns(LoRAWarning, match="new base"):
        tested = t.test(model, data(), ckpt_path="best", verbose=False)
    assert tested[0]["test_loss"] == pytest.approx(checkpoint.best_model_score.item())  # type: ignore[union-attr]


def test_another_configuration_on_a_merged_model_is_refused_and_leaves_it_merged(tmp_path: Path) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora()]).fit(model, data())
    output = model(X)
    with pytest.raises(AdapterMismatchError, match="remove_adapters"):
        trainer(tmp_path, [lora(r=4)]).fit(model, data())
    assert is_plain(model) and torch.equal(model(X), output)
    remove_adapters(model)
    trainer(tmp_path, [lora(r=4)]).fit(model, data())
    assert is_plain(model) and not torch.equal(model(X), output)


def test_remove_adapters_forgets_a_finished_fit(tmp_path: Path) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora()]).fit(model, data())
    output = model(X)
    remove_adapters(model)
    assert not [name for name in vars(model) if "lora" in name] and torch.equal(model(X), output)


# Mistakes, and what people see


def test_two_callbacks_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 LoRACallbacks"):
        trainer(tmp_path, [lora(), lora()]).fit(LitTiny(), data())


def test_model_adapted_by_hand_is_taken_over_or_refused(tmp_path: Path) -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["head"]))
    with pytest.raises(AdapterMismatchError, match="adapted already"):
        trainer(tmp_path, [lora(r=4)]).fit(model, data())
    trainer(tmp_path, [lora()]).fit(model, data())
    assert is_plain(model)


def test_model_merged_by_hand_is_unmerged_to_train(tmp_path: Path) -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["head"]))
    merge_adapters(model)
    trainer(tmp_path, [lora(merge=False)]).fit(model, data())
    assert not is_plain(model) and model.q_proj.lora_B.any()  # type: ignore[union-attr, operator]


class HalfUsed(LitTiny):
    """A module that never calls its v_proj."""

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.q_proj(self.embed(index))))


def test_dead_adapter_is_named(tmp_path: Path) -> None:
    with pytest.warns(DeadAdapterWarning, match="'v_proj'"):
        trainer(tmp_path, [lora()], max_epochs=1).fit(HalfUsed(), data())


def test_module_can_be_copied_and_pickled_in_the_middle_of_fit(tmp_path: Path) -> None:
    copies: list[nn.Module] = []
    take = At(2, lambda t, m: copies.extend([copy.deepcopy(m), pickle.loads(pickle.dumps(m))]))
    trainer(tmp_path, [lora(), take]).fit(LitTiny(), data())
    assert len(copies) == 2 and all(isinstance(each.q_proj, LoRALayer) for each in copies)


def test_table_at_the_start_and_line_at_the_end(tmp_path: Path, capsys: Any, caplog: Any) -> None:
    caplog.set_level("INFO")
    model = LitTiny()
    trainer(tmp_path, [lora()], enable_model_summary=True).fit(model, data())
    shown = capsys.readouterr().out
    assert "q_proj" in shown and "LoRA: LitTiny trains" in shown and "full fine-tuning" in shown
    assert "merged the last adapters into 2 layers" in caplog.text
    assert "LitTiny is a plain model, with 2 adapters merged into it" in str(summarize(model))
    trainer(tmp_path, [lora()]).fit(LitTiny(), data())
    assert "LoRA" not in capsys.readouterr().out


def test_sharding_strategy_is_refused(tmp_path: Path) -> None:
    t = trainer(tmp_path, [lora()])
    type(t.strategy).restore_checkpoint_after_setup = property(lambda _: True)  # type: ignore[assignment]
    try:
        with pytest.raises(StrategyError, match="SingleDeviceStrategy shards"):
            t.fit(LitTiny(), data())
    finally:
        del type(t.strategy).restore_checkpoint_after_setup


def test_the_other_lightning_package_works_alike(tmp_path: Path) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint as OtherCheckpoint

    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            inner = LitTiny()
            self.embed, self.q_proj, self.v_proj, self.head = inner.embed, inner.q_proj, inner.v_proj, inner.head

        forward, loss, training_step = LitTiny.forward, LitTiny.loss, LitTiny.training_step  # type: ignore[assignment]
        validation_step, test_step = LitTiny.validation_step, LitTiny.test_step  # type: ignore[assignment]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.05)

    assert isinstance(lora(), pl.Callback) and isinstance(lora(), L.Callback)
    checkpoint = OtherCheckpoint(tmp_path, monitor="val_loss")
    t = pl.Trainer(
        callbacks=[lora(merge="best"), checkpoint], accelerator="cpu", max_epochs=2, logger=False,  # type: ignore[list-item]
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    model = Other()
    t.fit(model, data(), data())
    assert is_plain(model) and sorted(tensors(checkpoint.best_model_path)) == sorted(TRAINED)
    tested = t.test(model, data(), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert tested == pytest.approx(checkpoint.best_model_score.item())  # type: ignore[union-attr]

"""The strategy loads and saves adapters at the right moments."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import StrategyError, load_adapter
from tests.cases import StopError, held, tensors
from tests.models import TRAINED, WIDTH, WORDS, LitTiny, best, data, is_plain, lora, same, state, trainer
from tests.training.cases import (
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

"""A resumed run ends with the same bits."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.support.models import LitTiny, data, exact, lora, same, state, trainer
from tests.support.training import Stateful


@pytest.mark.parametrize(
    "options", [{}, {"bias": "all", "alpha": 8}, {"modules_to_save": None, "target_modules": "all"}], ids=str
)
def test_resumed_run_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    through, resumed = LitTiny(), LitTiny()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(5)
    t = trainer(tmp_path, [lora(merge=False, **options), every], max_epochs=4)
    t.fit(through, data())
    t = trainer(tmp_path, [lora(merge=False, **options)], max_epochs=4)
    t.fit(resumed, data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(state(resumed), state(through)) and t.global_step == 16


def shuffled(**options: Any) -> DataLoader[Any]:
    return DataLoader(data().dataset, batch_size=4, shuffle=True, **options)


class WarmsUp(LitTiny):
    """A module that asks for the number of steps, so that Lightning starts the data loaders early."""

    def configure_optimizers(self) -> Any:
        steps = self.trainer.estimated_stepping_batches
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (step + 1) / steps))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Seeds(LitTiny):
    """A module that seeds the generators itself, after the hooks of all callbacks."""

    def on_fit_start(self) -> None:
        torch.manual_seed(1)


@exact
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}], ids=str)
@pytest.mark.parametrize("cls", [LitTiny, WarmsUp, Seeds])
def test_resumed_run_drops_and_shuffles_as_the_one_that_never_stopped(
    tmp_path: Path, cls: type[LitTiny], options: dict[str, Any]
) -> None:
    through, resumed = cls(), cls()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    torch.manual_seed(5)
    t = trainer(tmp_path, [lora(merge=False, dropout=0.3), every], max_epochs=4)
    t.fit(through, shuffled(**options), data())
    torch.manual_seed(6)
    t = trainer(tmp_path, [lora(merge=False, dropout=0.3)], max_epochs=4)
    t.fit(resumed, shuffled(**options), data(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert same(state(resumed), state(through))


@pytest.mark.processes
@exact
@pytest.mark.parametrize("cls", [LitTiny, WarmsUp])
def test_every_process_drops_and_shuffles_as_before(tmp_path: Path, cls: type[LitTiny]) -> None:
    through, resumed = cls(), cls()
    every = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    for model, callbacks, path in ((through, [every], None), (resumed, [], tmp_path / "epoch=1.ckpt")):
        torch.manual_seed(6 if callbacks else 5)
        options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 4, "enable_checkpointing": bool(callbacks)}
        trainer(tmp_path, [lora(dropout=0.3), *callbacks], **options).fit(model, shuffled(), ckpt_path=path)
    assert same(state(resumed), state(through))


class Stores(L.Callback):
    """It replaces the random states in files."""

    def __init__(self, states: Any) -> None:
        self.states = states

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["lightning_lora_random"] = self.states


@pytest.mark.parametrize(
    "states", [None, {}, {"cpu": 1}, {"cpu": torch.zeros(1, 3)}, {"cpu": torch.zeros(2, 5056, dtype=torch.uint8)}]
)
def test_random_states_of_another_machine_are_ignored(tmp_path: Path, states: Any) -> None:
    saves = ModelCheckpoint(tmp_path, filename="odd")
    trainer(tmp_path, [lora(dropout=0.3), Stores(states), saves], max_epochs=1).fit(LitTiny(), shuffled())
    t = trainer(tmp_path, [lora(dropout=0.3)], max_epochs=2)
    t.fit(LitTiny(), shuffled(), ckpt_path=tmp_path / "odd.ckpt")
    assert t.global_step == 8


@exact
@pytest.mark.parametrize("cls", [LitTiny, WarmsUp])
@pytest.mark.parametrize("step", [1, 6, 8, 11])
def test_run_resumed_at_any_step_ends_with_the_same_bits(tmp_path: Path, step: int, cls: type[LitTiny]) -> None:
    through, resumed = cls(), cls()
    every = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    torch.manual_seed(5)
    t = trainer(tmp_path, [lora(merge=False, dropout=0.3), every], max_epochs=3)
    t.fit(through, Stateful())
    torch.manual_seed(6)
    t = trainer(tmp_path, [lora(merge=False, dropout=0.3)], max_epochs=3)
    t.fit(resumed, Stateful(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert t.global_step == 12 and same(state(resumed), state(through))

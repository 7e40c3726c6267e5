"""What a resumed run reads may be edited, if a run can go on with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from lightning_lora import AdapterFileError, LoRAError
from tests.support.faults import edited, unchanged
from tests.support.models import LitTiny, best, data, lora, trainer
from tests.support.storage import fitted


class Scheduled(LitTiny):
    """A module with a scheduler of its learning rate."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class Keeps(L.Callback):
    """A callback with a state and an entry of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"mine": [1, 2.5, "a", None, (True,)], "average": torch.arange(3.0)}

    def on_save_checkpoint(
        self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["noted"] = {"at": trainer.global_step}


def callbacks() -> list[L.Callback]:
    return [lora(merge=False), Keeps(), EarlyStopping("val_loss")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    saves = best(folder, filename="a")
    trainer(folder, [*callbacks(), saves], max_epochs=1).fit(
        Scheduled(), data(), data()
    )
    return folder / "a.ckpt"


def group_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The one group of the one optimizer."""
    (optimizer,) = checkpoint["optimizer_states"]
    (group,) = optimizer["param_groups"]
    return group


def test_what_is_edited_is_what_the_resumed_run_reads(
    written: Path, tmp_path: Path
) -> None:
    def edit(checkpoint: dict[str, Any]) -> None:
        group_of(checkpoint)["lr"] = 1e-4
        checkpoint["lr_schedulers"] = []
        checkpoint["more"] = checkpoint.pop("noted")

    file = edited(written, tmp_path / "a.ckpt", edit)
    t = trainer(tmp_path, callbacks(), max_epochs=2)
    t.fit(LitTiny(), data(), data(), ckpt_path=file)
    assert t.global_step == 8
    (group,) = t.optimizers[0].param_groups
    assert group["lr"] == 1e-4


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no optimizers": lambda checkpoint: checkpoint.pop("optimizer_states"),
    "fewer optimizers": lambda checkpoint: checkpoint.update(optimizer_states=[]),
    "no schedulers": lambda checkpoint: checkpoint.pop("lr_schedulers"),
    "another optimizer": lambda checkpoint: checkpoint["optimizer_states"][0][
        "param_groups"
    ].clear(),
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_a_run_that_cannot_go_on_is_refused(
    written: Path, tmp_path: Path, change: Any
) -> None:
    path = edited(written, tmp_path / "a.ckpt", change)
    model = Scheduled()
    t = trainer(tmp_path, callbacks(), max_epochs=2)
    with unchanged(model), pytest.raises(LoRAError):
        t.fit(model, data(), data(), ckpt_path=path)


def test_weights_alone_are_not_resumed(tmp_path: Path) -> None:
    file = tmp_path / "light.ckpt"
    fitted(file, LitTiny(), lora(), weights_only=True)
    model = LitTiny()
    t = trainer(tmp_path, [lora()], max_epochs=2)
    with (
        unchanged(model),
        pytest.raises(AdapterFileError, match="save_weights_only=True"),
    ):
        t.fit(model, data(), ckpt_path=file)
    trainer(tmp_path, [lora()]).test(model, data(), ckpt_path=file, verbose=False)

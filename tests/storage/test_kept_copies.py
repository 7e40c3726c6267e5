"""Callbacks' copies of the base stay out of files."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as bundled
from torch import Tensor

from lightning_lora import LoRAError
from tests.support.models import LitTiny, best, data, lora, needs_averaging, same, state, trainer


class Drifts(LitTiny):
    """Its own code changes a frozen weight in each step."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.embed.weight.mul_(0.99)


class Keeps(L.Callback):
    """It keeps all parameters of the module as they are when a file is written."""

    def __init__(self) -> None:
        self.module: L.LightningModule | None = None
        self.kept: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.module = pl_module

    def state_dict(self) -> dict[str, Any]:
        assert self.module is not None
        return {"kept": {name: p.detach().clone() for name, p in self.module.named_parameters()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["kept"]


def test_a_frozen_weight_that_changed_is_in_the_file_wherever_it_is_kept(tmp_path: Path) -> None:
    model, keeps, saves = Drifts(), Keeps(), best(tmp_path, monitor=None, filename="a")
    trainer(tmp_path, [lora(merge=False), keeps, saves], max_epochs=1).fit(model, data())
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    held = checkpoint["callbacks"]["Keeps"]["kept"]
    assert torch.equal(held["embed.weight"], model.embed.weight) and held["q_proj.weight"] is None
    assert torch.equal(checkpoint["state_dict"]["embed.weight"], model.embed.weight)
    trainer(tmp_path, [lora(merge=False), again := Keeps()], max_epochs=1, enable_checkpointing=False).fit(
        LitTiny(), data(), ckpt_path=tmp_path / "a.ckpt"
    )
    assert all(torch.equal(again.kept[name], p) for name, p in model.named_parameters())


@needs_averaging
def test_an_average_beside_a_frozen_weight_that_changes_resumes_to_the_same_bits(tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Drifts, Path]:
        torch.manual_seed(5)
        model, folder = Drifts(), tmp_path / f"{epochs}{ckpt_path is None}"
        saves = best(folder, monitor=None, filename="{epoch}", save_top_k=-1)
        callbacks = [lora(merge=False), bundled.EMAWeightAveraging(decay=0.5), saves]
        trainer(tmp_path, callbacks, max_epochs=epochs).fit(model, data(), ckpt_path=ckpt_path)
        return model, folder

    whole, files = run(3)
    resumed, again = run(3, files / "epoch=1.ckpt")
    assert same(state(resumed), state(whole))
    a, b = (torch.load(folder / "epoch=2.ckpt", weights_only=True) for folder in (files, again))
    for key in ("state_dict", "current_model_state", "averaging_state"):
        assert same(a[key], b[key])
    first = torch.load(files / "epoch=0.ckpt", weights_only=True)["current_model_state"]
    torch.testing.assert_close(first["embed.weight"], LitTiny().embed.weight.detach() * 0.99**4)


class KeepsTwice(Keeps):
    """It keeps the same dictionary under two names."""

    def state_dict(self) -> dict[str, Any]:
        return {"again": [kept := super().state_dict()["kept"]], "kept": kept}


def test_what_is_kept_under_two_names_is_left_out_under_both(tmp_path: Path) -> None:
    saves = best(tmp_path, monitor=None, filename="a")
    trainer(tmp_path, [lora(merge=False), KeepsTwice(), saves], max_epochs=1).fit(LitTiny(), data())
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["KeepsTwice"]
    for each in (kept["kept"], *kept["again"]):
        assert {name for name, value in each.items() if value is None} == {
            "embed.weight", "q_proj.weight", "q_proj.bias", "v_proj.weight",
        }  # fmt: skip


def kept_file(folder: Path) -> Path:
    """A checkpoint with a callback's copies of the base, which lie in it as places alone."""
    saves = best(folder, monitor=None, filename="kept")
    trainer(folder, [lora(merge=False), Keeps(), saves], max_epochs=1).fit(LitTiny(), data())
    return folder / "kept.ckpt"


@pytest.mark.parametrize("cut", ["all callbacks", "one callback", "one value"])
def test_a_file_that_was_cut_by_hand_stays_cut(tmp_path: Path, cut: str) -> None:
    file = kept_file(tmp_path)
    checkpoint = torch.load(file, weights_only=True)
    if cut == "all callbacks":
        del checkpoint["callbacks"]
    elif cut == "one callback":
        del checkpoint["callbacks"]["Keeps"]
    else:
        del checkpoint["callbacks"]["Keeps"]["kept"]["embed.weight"]
    torch.save(checkpoint, file)
    callbacks = [lora(merge=False), keeps := Keeps()]
    t = trainer(tmp_path, callbacks, enable_checkpointing=False)
    if cut == "all callbacks":
        t.validate(LitTiny(), data(), ckpt_path=file, verbose=False)
    else:
        t.fit(LitTiny(), data(), ckpt_path=file)
    assert "embed.weight" not in keeps.kept and ("q_proj.weight" in keeps.kept) == (cut == "one value")


def test_copies_of_a_base_that_is_not_here_are_no_riddle(tmp_path: Path) -> None:
    class Smaller(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = self.embed
            del self.embed

    with pytest.raises(LoRAError, match=r"frozen tensors|do not fit"):
        trainer(tmp_path, [lora(), Keeps()]).fit(Smaller(), data(), ckpt_path=kept_file(tmp_path))

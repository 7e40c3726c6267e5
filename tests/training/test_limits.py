"""Where Lightning does not resume to the same bits, what docs/hazards.md says to do does."""

from pathlib import Path
from typing import Any

import lightning.pytorch.callbacks as bundled
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_lora import load_adapter
from tests.support.models import WORDS, LitTiny, data, lora, needs_averaging, same, state, trainer
from tests.support.training import Stateful

X = torch.arange(WORDS)


class Plateau(LitTiny):
    """A module whose learning rate halves in every epoch after the first."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        scheduler = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)
        every = {"interval": "step", "frequency": len(data())}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss", **every}}


SAVING: dict[str, dict[str, Any]] = {"epochs": {}, "steps": {"every_n_train_steps": 3}}


@pytest.mark.parametrize(("cls", "saving"), [(Plateau, "epochs"), (LitTiny, "epochs"), (LitTiny, "steps")])
def test_a_second_resume_is_exact_as_the_guide_says(tmp_path: Path, cls: type[LitTiny], saving: str) -> None:
    def run(folder: Path, file: Path | None = None) -> tuple[dict[str, Any], list[Path]]:
        torch.manual_seed(5)
        model, saves = cls(), ModelCheckpoint(folder, "{step}", save_top_k=-1, **SAVING[saving])
        trainer(tmp_path, [lora(), saves], max_epochs=3).fit(model, Stateful(), data(), ckpt_path=file)
        return state(model), sorted(folder.glob("*.ckpt"))

    expected, files = run(tmp_path / "through")
    assert len(files) == 12 // (4 if saving == "epochs" else 3)
    for file in files:
        once, again = run(tmp_path / file.stem, file)
        assert same(once, expected)
        for second in again:
            assert same(run(tmp_path / file.stem / second.stem, second)[0], expected)


@needs_averaging
def test_the_last_file_of_a_killed_run_holds_its_averages(tmp_path: Path) -> None:
    model, saves = LitTiny(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    trainer(tmp_path, [lora(), bundled.EMAWeightAveraging(decay=0.5), saves]).fit(model, data(), data())
    again = LitTiny()
    load_adapter(again, tmp_path / "epoch=1.ckpt")
    torch.testing.assert_close(again(X), model(X))

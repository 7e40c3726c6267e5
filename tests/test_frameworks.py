"""The page of other frameworks has the facts of its files, and what measures them sees what is wrong."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback
from tests.frameworks.__main__ import FRAMEWORKS, main
from tests.frameworks.case import Case, Run, Way
from tests.frameworks.measure import measure
from tests.frameworks.table import HERE, PAGE, RESULTS, fill, unexpected


class LitPlain(L.LightningModule):
    """A network, one that stands still beside it, and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
        self.still = nn.Linear(4, 4).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.still(self.net(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.01)


class Plain(Case):
    def new(self) -> LitPlain:
        return LitPlain()

    def lora(self, **options: Any) -> LoRACallback:
        return super().lora(target_modules=["net.0", "net.2"], **options)

    def data(self) -> Any:
        return DataLoader(
            torch.randn(16, 16, generator=torch.Generator().manual_seed(0)),
            batch_size=4,
            shuffle=True,
        )

    def predict(self, model: Any) -> Tensor:
        return model.still(model.net(torch.ones(1, 16)))


def test_page_has_the_facts_of_the_files() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert "| load |" in page
    assert fill(page) == page
    named = re.findall(r"^## (.*)\n\nRun with \1 [\d.]+\.\n", page, flags=re.MULTILINE)
    assert {path.stem for path in RESULTS.iterdir()} <= {*named}


def test_each_framework_has_a_file_of_its_own() -> None:
    cases = {path.stem for path in (HERE / "cases").glob("*.py")} - {
        "__init__",
        "conftest",
    }
    assert {name.replace("-", "_") for name in FRAMEWORKS} == cases
    assert {path.stem for path in RESULTS.iterdir()} <= FRAMEWORKS.keys()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["drats"], "unknown framework drats"), ([], "name frameworks")],
)
def test_a_wrong_command_says_what_is_expected(
    arguments: list[str], named: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert named in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_all_is_right_in_a_plain_module(tmp_path: Path) -> None:
    facts = measure(Plain(), tmp_path)
    names = ("fit", "resume", "load_adapter", "predictions")
    assert {
        fact for what, fact in facts.items() if what.partition(",")[0] in names
    } == {"yes"}
    assert facts["base in the file"] == []
    assert facts["moves"] == {"only with": [], "only without": [], "both": 2}
    assert facts["own"].keys() == {"load_from_checkpoint", "load_state_dict"}
    for found in facts["own"].values():
        assert found["plain"] == found["model"] == "yes"
        assert "Missing key(s)" in found["adapters"]


class Forgets(Plain):
    """It begins anew in place of going on, and takes from a file what has the right name."""

    def resume(self, file: Path, callbacks: list[Any], folder: Path) -> Any:
        return self.fit(callbacks, folder)

    def from_checkpoint(self, run: Run) -> Any:
        return LitPlain.load_from_checkpoint(run.file, strict=False)

    def ways(self) -> dict[str, Way]:
        return {**super().ways(), "base": lambda run: self.base(run.folder.parent)}


@pytest.mark.filterwarnings("ignore")
def test_what_is_wrong_without_an_error_is_seen(tmp_path: Path) -> None:
    facts = measure(Forgets(), tmp_path)
    # not counted: it is not LoRA's fault
    assert facts["own"]["base"]["plain"] == "no: the base's numbers"
    lines = list(unexpected({"plain": {"models": {"Plain": facts}}}))
    assert [line.partition(", off by")[0] for line in lines] == [
        "- plain: Plain, resume, adapters: other numbers",
        "- plain: Plain, resume, model: other numbers",
        "- plain: Plain, load_from_checkpoint, adapters: other numbers",
    ]

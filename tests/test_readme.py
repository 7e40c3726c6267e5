"""What README and pages show is there, and runs."""

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import nn

import lightning_lora
from lightning_lora import LoRACallback, LoRAConfig, inject_adapters
from tests.support.models import LitTiny, best, data, lora, trainer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in (ROOT / "docs").glob("*.md")}
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readme_is_short_and_begins_with_what_one_does() -> None:
    assert len(README.split()) <= 1300
    headings = re.findall(r"^## (.*)$", README, re.MULTILINE)
    assert headings[:3] == ["Install", "Results", "Recipes"]
    for command in ("pip install -e '.[examples]' && python examples/sentiment.py", "pip install -e '.[dev]' && "):
        assert command in README.split("## Results")[0]


def test_code_of_the_readme_fits_its_column_on_github() -> None:
    assert [line for text in BLOCKS for line in text.splitlines() if len(line) > 98] == []


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
        assert (path.parent / link).exists(), link


def test_rooms_that_the_readme_lists_are_all_there_are() -> None:
    package = ROOT / "lightning_lora"
    listed = set(re.findall(r"`(\w+\.py|\w+/)`", README))
    there = {f"{path.name}/" if path.is_dir() else path.name for path in package.iterdir() if "__" not in path.name}
    assert listed == there - {"py.typed"}


def test_tests_that_guard_hazards_are_there() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGES["hazards.md"])
    assert len(named) > 30 and [name for name in named if f"def {name}(" not in tests] == []


def test_every_callback_of_the_recipes_can_be_made() -> None:
    calls = re.findall(r"LoRACallback\((?:[^()]|\([^()]*\))*\)", "\n".join(BLOCKS))
    assert len(calls) >= 7
    for call in calls:
        assert isinstance(eval(call, {"LoRACallback": LoRACallback}), LoRACallback)


class MyModule(LitTiny):
    """The module of the recipes."""


def names(model: nn.Module) -> dict[str, Any]:
    """What the recipes take as imported, and as the reader's own."""
    own = {"L": L, "torch": torch, "ModelCheckpoint": ModelCheckpoint, "MyModule": MyModule, "model": model}
    return {name: getattr(lightning_lora, name) for name in lightning_lora.__all__} | own


def block(start: str) -> str:
    return next(text for text in BLOCKS if text.startswith(start))


def test_recipe_without_a_trainer_runs() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    exec(block("from lightning_lora import LoRAConfig"), names(model))


def test_recipe_of_a_notebook_runs(tmp_path: Path) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora()]).fit(model, data())
    exec(block("unmerge_adapters(model)"), names(model))
    assert all(torch.equal(value, LitTiny().state_dict()[name]) for name, value in model.state_dict().items())


def test_recipe_of_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MyModule()
    trainer(tmp_path, [lora(), best(tmp_path, filename="best")]).fit(model, data(), data())
    monkeypatch.chdir(tmp_path)
    known = names(model) | {"fresh_model": MyModule()}
    exec(block("save_adapter(model"), known)
    plain = MyModule.load_from_checkpoint("merged.ckpt")
    assert torch.equal(plain(torch.arange(4)), known["model"](torch.arange(4)))


def test_recipe_of_peft_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = MyModule()
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["head"]))
    exec(block("export_peft(model"), names(model))
    assert {path.name for path in Path("adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.filterwarnings("ignore:.*:jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_recipe_of_the_command_line_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = names(MyModule()) | {"LightningCLI": LightningCLI}
    exec(block("class LoRACLI"), known)
    monkeypatch.setattr("sys.argv", ["main.py", "--lora.r", "16", "--trainer.logger=false"])
    found = known["LoRACLI"](MyModule, run=False, seed_everything_default=1)
    assert next(c for c in found.trainer.callbacks if isinstance(c, LoRACallback)).config.r == 16


def test_recipe_of_resuming_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module(LitTiny):
        def train_dataloader(self) -> Any:
            return data()

    monkeypatch.chdir(tmp_path)
    code = block("trainer = L.Trainer(callbacks=[LoRACallback(r=8), ModelCheckpoint")
    small = code.replace("r=8", "r=2, modules_to_save=['head']")
    small = small.replace("L.Trainer(", "L.Trainer(accelerator='cpu', logger=False, max_epochs=1, ")
    with pytest.warns(UserWarning, match="no last checkpoint"):
        exec(small, names(Module()))
    exec(small.replace("max_epochs=1", "max_epochs=2"), names(Module()))


def test_first_lines_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Module(LitTiny):
        def __init__(self) -> None:
            super().__init__(width=16)
            self.head = nn.Linear(16, 16)

        def train_dataloader(self) -> Any:
            return data()

        test_dataloader = train_dataloader

    monkeypatch.chdir(tmp_path)
    code = block("import lightning").replace("L.Trainer(", "L.Trainer(accelerator='cpu', logger=False, max_epochs=1, ")
    exec(code, {"model": Module()})


def test_config_takes_what_the_pages_name() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"query": nn.Linear(4, 4), "key": nn.Linear(4, 4)})})
    assert inject_adapters(model, LoRAConfig(r=2, target_modules=r"encoder\..*(query|value)")) == ("encoder.query",)

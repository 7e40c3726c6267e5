"""The package as a whole: its public names, its summary, its version, and what the README shows."""

import ast
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import lightning_lora
from lightning_lora import LoRAConfig, errors, inject_adapters, merge_adapters, summarize
from tests.models import TinyLM

ROOT = Path(__file__).parent.parent


def test_public_names_are_those_of_the_contract() -> None:
    calls = {
        "inject_adapters", "merge_adapters", "unmerge_adapters", "remove_adapters", "disable_adapters", "save_adapter",
        "adapter_state_dict", "load_adapter_state_dict", "load_adapter", "load_from_checkpoint", "register_adapter",
        "summarize",
    }  # fmt: skip
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(lightning_lora.__all__) == calls | raised | {"LoRACallback", "LoRAConfig"}
    assert list(lightning_lora.__all__) == sorted(lightning_lora.__all__)
    assert all(getattr(lightning_lora, name).__doc__ for name in lightning_lora.__all__)


def test_the_drawn_tree_of_errors_is_the_tree() -> None:
    drawn = set(re.findall(r"\w+(?:Error|Warning)\b", (errors.__doc__ or "").replace("ValueError", "")))
    assert drawn == {name for name in vars(errors) if name.endswith(("Error", "Warning"))}


def test_version_is_the_projects() -> None:
    assert f'version = "{lightning_lora.__version__}"' in (ROOT / "pyproject.toml").read_text()
    section = "Unreleased" if ".dev" in lightning_lora.__version__ else lightning_lora.__version__
    assert f"## [{section}]" in (ROOT / "CHANGELOG.md").read_text()


def test_summary_counts_groups_and_costs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 8), *(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 2))
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["4"]))
    summary = summarize(model)
    assert summary.trained == 3 * 2 * (8 + 8) + 8 * 2 + 2
    assert summary.frozen == 80 + 3 * 72
    assert [(group.name, group.layers, group.kind, group.r) for group in summary.groups] == [
        ("*", 1, "Embedding", None), ("*", 3, "Linear", 2), ("*", 1, "Linear", None),
    ]  # fmt: skip
    assert summary.optimizer_bytes == 2 * 4 * summary.trained  # Adam's two moments, fp32
    assert summary.full_optimizer_bytes == 2 * 4 * (80 + 3 * 72 + 18)
    assert summary.checkpoint_bytes == 4 * summary.trained
    assert summary.full_checkpoint_bytes == 4 * (80 + 3 * 72 + 18)


def test_summary_prints_every_layer_of_a_plain_model_too() -> None:
    shown = str(summarize(TinyLM()))
    assert all(name in shown for name in ("embed", "q_proj", "v_proj", "norm")) and "TinyLM is a plain model" in shown
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2))
    merge_adapters(model)
    assert "TinyLM is a plain model, with 2 adapters merged into it" in str(summarize(model))


def test_summary_shown_at_the_start_fits_a_terminal() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"encoder": nn.ModuleList()}), "norm": nn.LayerNorm(64)})
    for _ in range(12):
        layer = {"attention": nn.ModuleDict({"self": nn.ModuleDict({"query": nn.Linear(64, 64)})})}
        model["encoder"]["encoder"].append(nn.ModuleDict(layer))  # type: ignore[operator]
    inject_adapters(model, LoRAConfig(r=2))
    console = Console(width=80)
    with console.capture() as capture:
        console.print(summarize(model).table(trained_only=True))
    assert "│ …attention.self.query (×12)" in capture.get() and "│ 1 other layer " in capture.get()
    assert "encoder.encoder.*.attention.self.query (×12)" in str(summarize(model))


def test_public_docstrings_begin_with_ten_words_at_most() -> None:
    long = []
    for path in (ROOT / "lightning_lora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            name = "" if isinstance(node, ast.Module) else node.name
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            if not name.startswith("_") and len(first.split()) > 10:
                long.append(f"{path.name} {name}: {first}")
    assert not long


@pytest.mark.parametrize("module", ["peft", "transformers", "jsonargparse"])
def test_import_needs_no_optional_package(module: str) -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "lightning_lora").rglob("*.py"))
    assert not re.search(rf"^\s*(from|import) {module}\b", sources, re.MULTILINE)

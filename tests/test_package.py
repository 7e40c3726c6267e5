"""The package's names, version and imports are as promised."""

import re
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora import errors


def test_public_names_are_those_of_the_contract() -> None:
    calls = {
        "adapter_state_dict", "disable_adapters", "export_peft", "inject_adapters", "load_adapter",
        "load_adapter_state_dict", "load_from_checkpoint", "merge_adapters", "register_adapter", "remove_adapters",
        "save_adapter", "save_merged", "summarize", "unmerge_adapters", "adapters", "set_adapter",
        "adapter_names",
    }  # fmt: skip
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert set(lightning_lora.__all__) == calls | raised | {"LoRACallback", "LoRAConfig", "LoRAMonitor", "LoRASweep"}
    assert list(lightning_lora.__all__) == sorted(lightning_lora.__all__)
    assert all(getattr(lightning_lora, name).__doc__ for name in lightning_lora.__all__)


ROOT = Path(__file__).parent.parent


def test_version_is_the_projects() -> None:
    assert f'version = "{lightning_lora.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {lightning_lora.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    section = "Unreleased" if ".dev" in lightning_lora.__version__ else lightning_lora.__version__
    assert f"## [{section}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("module", ["peft", "transformers", "jsonargparse"])
def test_import_needs_no_optional_package(module: str) -> None:
    package = ROOT / "lightning_lora"
    sources = "\n".join(path.read_text() for path in package.rglob("*.py"))
    assert not re.search(rf"^\s*(from|import) {module}\b", sources, re.MULTILINE)

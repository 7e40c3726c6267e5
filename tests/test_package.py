"""The package's names, version and imports are as promised."""

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora.errors import warn

ROOT = Path(__file__).parent.parent


def test_public_names_are_in_order_and_explained() -> None:  # which they are, test_stability says
    assert list(lightning_lora.__all__) == sorted(lightning_lora.__all__)
    assert all(getattr(lightning_lora, name).__doc__ for name in lightning_lora.__all__)


def test_version_is_the_projects() -> None:
    assert f'version = "{lightning_lora.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {lightning_lora.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    section = "Unreleased" if ".dev" in lightning_lora.__version__ else lightning_lora.__version__
    assert f"## [{section}]" in (ROOT / "CHANGELOG.md").read_text()


UNCHANGED = """
import logging, os, random, sys, warnings, lightning.pytorch, torch, torchmetrics
from torch.nn.modules import module
from torch.optim import optimizer

def held():
    hooks = {(each.__name__, name): list(value) for each in (module, optimizer)
             for name, value in vars(each).items() if name.startswith("_global") and hasattr(value, "items")}
    assert len(hooks) > 5
    random_states = random.getstate(), torch.get_rng_state().tolist(), torch.is_grad_enabled(), torch.get_num_threads()
    patched = {name: dict(vars(each)) for name, each in sys.modules.items() if name in MODULES}
    return hooks, random_states, patched, dict(os.environ), list(warnings.filters), logging.root.handlers[:]

MODULES = ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "lightning.pytorch", "copyreg", "pickle")
before = held()
import lightning_lora
assert held() == before
"""


@pytest.mark.processes
def test_a_filter_of_warnings_by_module_means_the_users() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module=__name__)
        warn("hidden")
    assert not told


def test_nothing_of_the_process_changes_at_import() -> None:
    done = subprocess.run([sys.executable, "-c", UNCHANGED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["peft", "transformers", "jsonargparse"])
def test_import_needs_no_optional_package(module: str) -> None:
    package = ROOT / "lightning_lora"
    sources = "\n".join(path.read_text() for path in package.rglob("*.py"))
    assert not re.search(rf"^(from|import) {module}\b", sources, re.MULTILINE)  # inside of functions, it may be asked

"""The package's names, version and imports are as promised."""

import os
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest

import lightning_lora
from lightning_lora.errors import warn

ROOT = Path(__file__).parent.parent


# which they are, test_stability says
def test_public_names_are_in_order_and_explained() -> None:
    assert list(lightning_lora.__all__) == sorted(lightning_lora.__all__)
    assert all(getattr(lightning_lora, name).__doc__ for name in lightning_lora.__all__)


def test_completion_shows_the_public_names_alone() -> None:
    assert dir(lightning_lora) == sorted(["__version__", *lightning_lora.__all__])


def test_version_is_the_projects() -> None:
    assert (
        f'version = "{lightning_lora.__version__}"'
        in (ROOT / "pyproject.toml").read_text()
    )
    assert (
        f"\nversion: {lightning_lora.__version__}\n"
        in (ROOT / "CITATION.cff").read_text()
    )
    section = (
        "Unreleased"
        if ".dev" in lightning_lora.__version__
        else lightning_lora.__version__
    )
    assert f"## [{section}]" in (ROOT / "CHANGELOG.md").read_text()


# the others run what they installed
def test_only_who_changes_the_code_installs_a_link_to_it() -> None:
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.*")]
    found = [
        re.findall(r"pip install -e '\.\[(\w+)\]'", text.read_text(errors="ignore"))
        for text in texts
    ]
    assert {extra for extras in found for extra in extras} == {"dev", "docs"}


@pytest.mark.processes
def test_a_clone_beside_a_script_hides_nothing_of_a_link_to_it(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "70.1")
    # the folder of the clone has the name of the package
    (tmp_path / "lightning_lora").mkdir()
    (tmp_path / "script.py").write_text("from lightning_lora import LoRACallback")
    setup = (
        "from setuptools import setup; setup(script_args=['-q', 'editable_wheel', "
        f"'-d', {str(tmp_path)!r}])"
    )
    shutil.copytree(ROOT / "lightning_lora", tmp_path / "clone" / "lightning_lora")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "clone")
    subprocess.run(
        [sys.executable, "-c", setup],
        cwd=tmp_path / "clone",
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (link,) = [
            file.read(name).decode()
            for name in file.namelist()
            if name.endswith(".pth")
        ]
    # a finder of setuptools would come after the folder
    assert link.strip() == str(tmp_path / "clone")
    path = {"PYTHONPATH": link.strip()}
    subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, **path},
        check=True,
    )


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
    done = subprocess.run(
        [sys.executable, "-c", UNCHANGED], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["peft", "transformers", "jsonargparse"])
def test_import_needs_no_optional_package(module: str) -> None:
    package = ROOT / "lightning_lora"
    sources = "\n".join(path.read_text() for path in package.rglob("*.py"))
    # inside of functions, it may be asked
    assert not re.search(rf"^(from|import) {module}\b", sources, re.MULTILINE)

"""Fixtures of the tests of files."""

import tempfile
from pathlib import Path

import pytest
import torch

from lightning_lora import save_adapter
from tests.support.faults import adapted
from tests.support.models import LitTiny, lora, state
from tests.support.storage import fitted, trained


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_adapter(trained(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.fixture(autouse=True)
def temporary(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let temporary files lie in a folder of this test's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind, and what they hold."""
    folder = tmp_path_factory.mktemp("good")
    model = fitted(folder / "good.ckpt", adapted(3))
    save_adapter(model, folder / "good.safetensors")
    torch.save(state(model), folder / "good.pt")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "lora.ckpt"
    fitted(path, LitTiny(), lora())
    return path

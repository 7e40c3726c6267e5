"""Fixtures of the tests of files."""

import tempfile
from pathlib import Path

import pytest
import torch

from lightning_lora import save_adapter
from tests.support.faults import adapted
from tests.support.models import LitTiny, data, lora, state, trainer
from tests.support.storage import trained


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_adapter(trained(), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let temporary files lie in a folder of this test's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind, and what they hold."""
    folder, model = tmp_path_factory.mktemp("good"), adapted(3)
    t = trainer(folder, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    t.save_checkpoint(folder / "good.ckpt")
    save_adapter(model, folder / "good.safetensors")
    torch.save(state(model), folder / "good.pt")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    t = trainer(tmp_path, [lora()], max_epochs=1)
    t.fit(LitTiny(), data())
    t.save_checkpoint(tmp_path / "lora.ckpt")
    return tmp_path / "lora.ckpt"

"""Runs in processes of their own are killed and resumed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import load_adapter
from tests.support.cases import held
from tests.support.models import LitTiny, data, same, trainer

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
TRAINED = {"q_proj.lora_A", "q_proj.lora_B", "v_proj.lora_A", "v_proj.lora_B", "head.weight", "head.bias"}


def train(folder: Path, strategy: str, devices: int, *options: str, ok: bool = True) -> Any:
    """Run tests.support.train; return its result, or what it printed if it is to fail."""
    command = [sys.executable, "-m", "tests.support.train", str(folder), strategy, str(devices), *options]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (run.returncode == 0) is ok, run.stderr[-3000:]
    return torch.load(folder / "result.pt", weights_only=True) if ok else run.stderr


def adapters(path: Path) -> dict[str, torch.Tensor]:
    return held(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [("single", 1), ("ddp_fork", 2), ("ddp", 2), ("ddp_spawn", 2)],
)
def test_killed_and_resumed_ends_with_the_same_adapters(tmp_path: Path, strategy: str, devices: int) -> None:
    through = train(tmp_path / "through", strategy, devices)
    train(
        tmp_path / "killed", strategy, devices, "--kill-at", str(3 * 4 // devices - 1), ok=False
    )  # in the third epoch
    assert not (tmp_path / "killed" / "result.pt").exists()
    assert sorted(path.name for path in (tmp_path / "killed").glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    resumed = train(tmp_path / "killed", strategy, devices, "--resume")
    assert same(adapters(tmp_path / "killed" / "epoch=3.ckpt"), adapters(tmp_path / "through" / "epoch=3.ckpt"))
    assert same(resumed["state"], through["state"])
    check(tmp_path / "through", through)


def check(folder: Path, result: dict[str, Any]) -> None:
    """A finished run: plain and merged in the main process, right numbers later, adapters alone in every file."""
    base = LitTiny()
    assert list(result["state"]) == list(base.state_dict()) and result["classes"][1:] == [
        "Embedding",
        "Linear",
        "Linear",
        "Linear",
    ]
    model = LitTiny().eval()
    load_adapter(model, folder / "epoch=3.ckpt")
    merged = LitTiny()
    merged.load_state_dict(result["state"])
    x = torch.arange(20)
    torch.testing.assert_close(merged(x), model(x))
    assert not torch.equal(merged(x), base(x))
    assert all(set(adapters(path)) == TRAINED for path in folder.glob("*.ckpt"))
    assert (folder / "after.ckpt").exists()
    load_adapter(model, result["best"])
    loss = trainer(folder).test(model, data(), verbose=False)[0]["test_loss"]
    assert result["tested"] == pytest.approx(loss, rel=1e-5)


def test_spawning_merges_the_best_and_refuses_what_cannot_come_back(tmp_path: Path) -> None:
    result = train(tmp_path / "best", "ddp_fork", 2, "--merge", "best")
    model, merged = LitTiny().eval(), LitTiny()
    load_adapter(model, result["best"])
    merged.load_state_dict(result["state"])
    torch.testing.assert_close(merged(torch.arange(20)), model(torch.arange(20)))
    wide = train(tmp_path / "wide", "ddp_fork", 2, "--wide", "--merge", "best")
    assert wide["classes"][1:] == ["Embedding", "Linear", "Linear", "Linear"]
    assert "merge=False would lose the adapters" in train(tmp_path / "none", "ddp_fork", 2, "--merge", "none", ok=False)
    assert "one tied weight" in train(tmp_path / "tied", "ddp_fork", 2, "--tied", ok=False)


def test_another_trainer_finds_the_exact_base_too(tmp_path: Path) -> None:
    train(tmp_path, "ddp_fork", 2, "--again")
    load_adapter(LitTiny(), tmp_path / "again" / "again.ckpt")  # which refuses adapters of any other base


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """DDP averages gradients: two processes on half of each batch take the steps of one on the whole."""
    two = train(tmp_path / "two", "ddp_fork", 2, "--shares")
    one = train(tmp_path / "one", "single", 1, "--shares")
    torch.testing.assert_close(two["state"], one["state"], atol=1e-4, rtol=1e-3)

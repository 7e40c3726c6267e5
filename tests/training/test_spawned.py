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
from tests.support.faults import fork
from tests.support.models import TRAINED, LitTiny, data, same, trainer
from tests.support.train import main

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]


def train(folder: Path, strategy: str, devices: int, *options: str) -> Any:
    """Run tests.support.train in a fork, or as a program if its strategy starts it again; return the result."""
    arguments = [str(folder), strategy, str(devices), *options]
    if strategy == "ddp":
        command = [sys.executable, "-m", "tests.support.train", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        assert fork(lambda: main(*arguments)) == 0, "it was killed"
    return torch.load(folder / "result.pt", weights_only=True)


def failing(folder: Path, strategy: str, devices: int, *options: str) -> str:
    """What a run says that fails."""
    with pytest.raises((AssertionError, pytest.fail.Exception)) as error:
        train(folder, strategy, devices, *options)
    assert not (folder / "result.pt").exists()
    return str(error.value)


def adapters(path: Path) -> dict[str, torch.Tensor]:
    return held(torch.load(path, weights_only=True))


@pytest.mark.parametrize(
    ("strategy", "devices"),
    [("single", 1), ("ddp_fork", 2), ("ddp", 2), ("ddp_spawn", 2)],
)
def test_killed_and_resumed_ends_with_the_same_adapters(tmp_path: Path, strategy: str, devices: int) -> None:
    through, killed = tmp_path / "through", tmp_path / "killed"
    expected = train(through, "ddp_fork" if devices > 1 else "single", devices)
    failing(killed, strategy, devices, "--kill-at", str(3 * 4 // devices - 1))  # in the third epoch
    assert sorted(path.name for path in killed.glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    resumed = train(killed, strategy, devices, "--resume", "--test")
    assert same(adapters(killed / "epoch=3.ckpt"), adapters(through / "epoch=3.ckpt"))
    assert same(resumed["state"], expected["state"])
    check(killed, resumed)


CLASSES = ["Embedding", "Linear", "Linear", "Linear"]


def check(folder: Path, result: dict[str, Any]) -> None:
    """A finished run: plain and merged in the main process, right numbers later, adapters alone in every file."""
    base, model, merged, x = LitTiny(), LitTiny().eval(), LitTiny(), torch.arange(20)
    assert list(result["state"]) == list(base.state_dict()) and result["classes"][1:] == CLASSES
    load_adapter(model, folder / "epoch=3.ckpt")
    merged.load_state_dict(result["state"])
    torch.testing.assert_close(merged(x), model(x))
    assert not torch.equal(merged(x), base(x))
    files = {path.name: set(adapters(path)) for path in folder.glob("*.ckpt")}
    assert {"after.ckpt", "again.ckpt"} <= files.keys() and all(names == {*TRAINED} for names in files.values())
    load_adapter(model, result["best"])
    loss = trainer(folder).test(model, data(), verbose=False)[0]["test_loss"]
    assert result["tested"] == pytest.approx(loss, rel=1e-5)


def test_spawning_merges_the_best_and_refuses_what_cannot_come_back(tmp_path: Path) -> None:
    result = train(tmp_path / "best", "ddp_fork", 2, "--merge", "best")
    model, merged = LitTiny().eval(), LitTiny()
    load_adapter(model, result["best"])
    merged.load_state_dict(result["state"])
    torch.testing.assert_close(merged(torch.arange(20)), model(torch.arange(20)))
    wide = train(tmp_path / "wide", "ddp_fork", 2, "--module", "Wide", "--merge", "best")
    assert wide["classes"][1:] == CLASSES
    assert "merge=False would lose the adapters" in failing(tmp_path / "none", "ddp_fork", 2, "--merge", "none")
    assert "one tied weight" in failing(tmp_path / "tied", "ddp_fork", 2, "--module", "Tied")


def test_another_trainer_finds_the_exact_base_too(tmp_path: Path) -> None:
    train(tmp_path, "ddp_fork", 2, "--again")
    load_adapter(LitTiny(), tmp_path / "again" / "again.ckpt")  # which refuses adapters of any other base


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """DDP averages gradients: two processes on half of each batch take the steps of one on the whole."""
    two = train(tmp_path / "two", "ddp_fork", 2, "--module", "Shares")
    one = train(tmp_path / "one", "single", 1, "--module", "Shares")
    torch.testing.assert_close(two["state"], one["state"], atol=1e-4, rtol=1e-3)

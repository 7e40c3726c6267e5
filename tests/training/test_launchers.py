"""A fit ends with the same bits, whatever starts its processes, and those that are killed go on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import launched
from tests.support import train as training
from tests.support.cases import files_hold_adapters_alone, held
from tests.support.faults import FORK, fork
from tests.support.fits import loaded, outcome
from tests.support.models import TRAINED, LitTiny, X, same, trainer
from tests.support.ranks import free_port
from tests.support.versions import exact, keeps_random

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
LIMIT = 300.0
"""Seconds for one launcher."""


class Command:  # a new process, with the variables that a launcher sets
    def __init__(self, *command: str, **variables: str) -> None:
        self.command = command
        self.environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        self.environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # and nothing that another one has set
        self.environment |= variables

    def start(self, log: Path) -> None:
        with log.open("wb") as file:
            how: dict[str, Any] = {"stdout": file, "stderr": file, "start_new_session": True}
            self.process = subprocess.Popen([sys.executable, *self.command], cwd=ROOT, env=self.environment, **how)

    def code(self) -> int | None:
        return self.process.poll()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and its children
        self.process.wait()


class Program(Command):  # a fork that does what python -m tests.support.launched does, which need not import all anew
    def start(self, log: Path) -> None:
        self.fork = FORK.Process(target=self.work, args=(log,))
        self.fork.start()

    def work(self, log: Path) -> None:
        os.setsid()
        os.environ.clear()
        os.environ.update(self.environment)
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
        launched.main(*self.command)

    def code(self) -> int | None:
        return self.fork.exitcode  # type: ignore[no-any-return]

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.fork.pid, signal.SIGKILL)
        self.fork.join()


def run(folder: Path, commands: Sequence[Command]) -> None:
    """Run commands side by side, and show what they printed if one of them fails or does not end."""
    logs = [folder / f"{number}.log" for number in range(len(commands))]
    for command, log in zip(commands, logs, strict=True):
        command.start(log)
    over = time.monotonic() + LIMIT
    try:
        while None in (codes := [command.code() for command in commands]) and not any(codes):
            if time.monotonic() > over:
                break
            time.sleep(0.05)
    finally:
        for command in commands:
            command.end()
    assert not any(codes) and None not in codes, "\n".join(log.read_text() for log in logs)


Launcher = Callable[[Path], list[Command]]


def forking(folder: Path) -> list[Command]:
    return [Program(str(folder), "--strategy=ddp_fork")]


def lightning(folder: Path) -> list[Command]:
    return [Command("-m", "tests.support.launched", str(folder))]


def slurm(folder: Path, *options: str) -> list[Command]:
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "fit",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    ranks = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    return [Program(str(folder), *options, **job, **rank) for rank in ranks]


def ray(folder: Path) -> list[Command]:
    return [Command("-m", "tests.support.launched_by_ray", str(folder))]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launchers")


def result(results: Path, *launchers: Launcher) -> Path:
    """What one launcher gives, or several ones after each other, all in one folder: files hold its path."""
    folder = results / "now"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for launcher in launchers:
        run(folder, launcher(folder))
    return folder.rename(results / launchers[-1].__name__)


@pytest.fixture(scope="module")
def forked(results: Path) -> Path:
    return result(results, forking)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


def test_forked_fit_trains_writes_adapters_alone_and_resumes_to_the_same_bits(forked: Path) -> None:
    assert not torch.equal(weights(forked / "through.pt")["q_proj.weight"], LitTiny().q_proj.weight)
    assert files_hold_adapters_alone(forked)
    assert not keeps_random or same(weights(forked / "resumed.pt"), weights(forked / "through.pt"))


WRITTEN = ("through.pt", "through/epoch=0.ckpt", "through/epoch=1.ckpt", "resumed.pt", "resumed/epoch=1.ckpt")


def differing(a: Path, b: Path) -> list[str]:
    """Which of the weights and files are not the same to the byte."""
    return [name for name in WRITTEN if (a / name).read_bytes() != (b / name).read_bytes()]


@pytest.mark.parametrize("launcher", [lightning, slurm])
def test_launchers_give_the_same_bits(launcher: Launcher, results: Path, forked: Path) -> None:
    assert differing(result(results, launcher), forked) == []


def test_ray_gives_the_same_bits_and_reports_adapters_alone(results: Path, forked: Path) -> None:
    pytest.importorskip("ray.train.lightning")
    given = result(results, ray)
    assert differing(given, forked) == []
    assert len(list(given.glob("reported/**/checkpoint.ckpt"))) == 3  # one for each epoch
    assert files_hold_adapters_alone(given / "reported")


@exact
def test_a_job_that_slurm_requeues_goes_on_to_the_same_bits(results: Path, forked: Path) -> None:
    def requeued(folder: Path) -> list[Command]:
        return slurm(folder, "--requeue")

    given = result(results, requeued, requeued)
    assert same(weights(given / "through.pt"), weights(forked / "through.pt"))
    assert (given / "hpc_ckpt_1.ckpt").exists() and files_hold_adapters_alone(given)


# Killed and resumed


def train(folder: Path, strategy: str = "ddp_fork", **options: Any) -> Any:
    """Run tests.support.train in a fork, and return the result."""
    assert fork(lambda: training.run(folder, strategy, **options)) == 0, "it was killed"
    return torch.load(folder / "result.pt", weights_only=True)


def failing(folder: Path, **options: Any) -> str:
    """What a run says that fails."""
    with pytest.raises((AssertionError, pytest.fail.Exception)) as error:
        train(folder, **options)
    assert not (folder / "result.pt").exists()
    return str(error.value)


def adapters(path: Path) -> dict[str, torch.Tensor]:
    return held(weights(path))


CLASSES = ["Embedding", "Linear", "Linear", "Linear"]


def came_back(result: dict[str, Any], file: Path) -> bool:
    """Whether the main process has a plain module with the adapters of a file merged."""
    merged = LitTiny()
    merged.load_state_dict(result["state"])
    torch.testing.assert_close(merged(X), loaded(file).eval()(X))
    return result["classes"][1:] == CLASSES


def test_killed_and_resumed_ends_with_the_same_adapters(tmp_path: Path) -> None:
    through, killed = tmp_path / "through", tmp_path / "killed"
    expected = train(through)
    failing(killed, kill_at=5)  # in the third epoch
    assert sorted(path.name for path in killed.glob("*.ckpt")) == ["epoch=0.ckpt", "epoch=1.ckpt"]
    resumed = train(killed, resumes=True, tests=True)
    assert same(adapters(killed / "epoch=3.ckpt"), adapters(through / "epoch=3.ckpt"))
    assert same(resumed["state"], expected["state"]) and came_back(resumed, killed / "epoch=3.ckpt")
    files = {path.name: set(adapters(path)) for path in killed.glob("*.ckpt")}
    assert {"after.ckpt", "again.ckpt"} <= files.keys() and all(names == {*TRAINED} for names in files.values())
    loss = outcome(trainer(killed), "test", loaded(resumed["best"]))
    assert resumed["tested"] == pytest.approx(loss.item(), rel=1e-5)


def test_spawning_merges_the_best_and_refuses_what_cannot_come_back(tmp_path: Path) -> None:
    result = train(tmp_path / "best", "ddp_spawn", merge="best")
    assert came_back(result, result["best"])
    assert train(tmp_path / "wide", module=training.Wide, merge="best")["classes"][1:] == CLASSES
    assert "merge=False would lose the adapters" in failing(tmp_path / "none", merge=False)
    assert "is tied, and a merge changes one use" in failing(tmp_path / "tied", module=training.Tied)

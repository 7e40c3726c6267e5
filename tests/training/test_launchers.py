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
from tests.support.compared import assert_same_tensors
from tests.support.faults import FORK, fork
from tests.support.fits import loaded, outcome
from tests.support.models import TRAINED, LitTiny, X, trainer
from tests.support.ranks import free_port
from tests.support.versions import exact, keeps_random

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
LIMIT = 300.0
"""Seconds for one launcher."""


KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR")


def environment_with(variables: dict[str, str]) -> dict[str, str]:
    """The variables of a new process: those of every process, these, and nothing that another launcher has set."""
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name in KEPT_VARIABLES:
        if name in os.environ:
            environment[name] = os.environ[name]
    return environment | variables


class Command:
    """A new process, with the variables that a launcher sets."""

    def __init__(self, *command: str, **variables: str) -> None:
        self.command = command
        self.environment = environment_with(variables)

    def start(self, log: Path) -> None:
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                cwd=ROOT,
                env=self.environment,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def code(self) -> int | None:
        return self.process.poll()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # and its children
        self.process.wait()


class Program(Command):
    """A fork that does what python -m tests.support.launched does, which need not import all anew."""

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
        sys.stdout = sys.__stdout__
        sys.stderr = sys.__stderr__
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
    try:
        codes = codes_at_the_end(commands)
    finally:
        for command in commands:
            command.end()
    printed = "\n".join(log.read_text() for log in logs)
    assert codes == [0] * len(commands), printed


def codes_at_the_end(commands: Sequence[Command]) -> list[int | None]:
    """What each gives when all have ended, when one has failed, or when there is no more time."""
    over = time.monotonic() + LIMIT
    while True:
        codes = [command.code() for command in commands]
        have_ended = None not in codes
        has_failed = any(codes)
        if have_ended or has_failed or time.monotonic() > over:
            return codes
        time.sleep(0.05)


Launcher = Callable[[Path], list[Command]]


def forking(folder: Path) -> list[Command]:
    return [Program(str(folder), "--strategy=ddp_fork")]


def lightning(folder: Path) -> list[Command]:
    return [Command("-m", "tests.support.launched", str(folder))]


def slurm(folder: Path, *options: str) -> list[Command]:
    port = str(free_port())

    def task(number: str) -> Command:
        return Program(
            str(folder),
            *options,
            SLURM_JOB_ID="4711",
            SLURM_JOB_NAME="fit",
            SLURM_NODELIST="localhost",
            MASTER_PORT=port,
            SLURM_NTASKS="2",
            SLURM_NTASKS_PER_NODE="2",
            SLURM_NNODES="1",
            SLURM_NODEID="0",
            SLURM_PROCID=number,
            SLURM_LOCALID=number,
        )

    return [task("0"), task("1")]


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


def test_forked_fit_trains_writes_adapters_alone_and_resumes_to_the_same_bits(
    forked: Path,
) -> None:
    through = weights(forked / "through.pt")
    assert not torch.equal(through["q_proj.weight"], LitTiny().q_proj.weight)
    assert files_hold_adapters_alone(forked)
    if keeps_random:
        assert_same_tensors(weights(forked / "resumed.pt"), through)


WRITTEN = (
    "through.pt",
    "through/epoch=0.ckpt",
    "through/epoch=1.ckpt",
    "resumed.pt",
    "resumed/epoch=1.ckpt",
)


def assert_same_bytes(found: Path, expected: Path) -> None:
    """The weights and files are the same to the byte."""
    for name in WRITTEN:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.mark.parametrize("launcher", [lightning, slurm])
def test_launchers_give_the_same_bits(
    launcher: Launcher, results: Path, forked: Path
) -> None:
    given = result(results, launcher)
    assert_same_bytes(given, forked)


def test_ray_gives_the_same_bits_and_reports_adapters_alone(
    results: Path, forked: Path
) -> None:
    pytest.importorskip("ray.train.lightning")
    given = result(results, ray)
    assert_same_bytes(given, forked)
    reported = list(given.glob("reported/**/checkpoint.ckpt"))
    assert len(reported) == 3  # one for each epoch
    assert files_hold_adapters_alone(given / "reported")


@exact
def test_a_job_that_slurm_requeues_goes_on_to_the_same_bits(
    results: Path, forked: Path
) -> None:
    def requeued(folder: Path) -> list[Command]:
        return slurm(folder, "--requeue")

    given = result(results, requeued, requeued)
    assert_same_tensors(weights(given / "through.pt"), weights(forked / "through.pt"))
    assert (given / "hpc_ckpt_1.ckpt").exists()
    assert files_hold_adapters_alone(given)


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


def assert_is_plain(result: dict[str, Any]) -> None:
    """The main process has a module of plain layers."""
    assert result["classes"][1:] == ["Embedding", "Linear", "Linear", "Linear"]


def assert_came_back(result: dict[str, Any], file: Path) -> None:
    """The main process has a plain module with the adapters of a file merged."""
    merged = LitTiny()
    merged.load_state_dict(result["state"])
    adapted = loaded(file).eval()
    torch.testing.assert_close(merged(X), adapted(X))
    assert_is_plain(result)


def test_killed_and_resumed_ends_with_the_same_adapters(tmp_path: Path) -> None:
    through = tmp_path / "through"
    killed = tmp_path / "killed"
    expected = train(through)
    failing(killed, kill_at=5)  # in the third epoch
    assert {path.name for path in killed.glob("*.ckpt")} == {
        "epoch=0.ckpt",
        "epoch=1.ckpt",
    }
    resumed = train(killed, resumes=True, tests=True)
    last = killed / "epoch=3.ckpt"
    assert_same_tensors(adapters(last), adapters(through / "epoch=3.ckpt"))
    assert_same_tensors(resumed["state"], expected["state"])
    assert_came_back(resumed, last)
    assert (killed / "after.ckpt").exists()
    assert (killed / "again.ckpt").exists()
    for file in killed.glob("*.ckpt"):
        assert set(adapters(file)) == set(TRAINED)
    loss = outcome(trainer(killed), "test", loaded(resumed["best"]))
    assert resumed["tested"] == pytest.approx(loss.item(), rel=1e-5)


def test_spawning_merges_the_best_and_refuses_what_cannot_come_back(
    tmp_path: Path,
) -> None:
    of_best = train(tmp_path / "best", "ddp_spawn", merge="best")
    assert_came_back(of_best, of_best["best"])
    of_wide = train(tmp_path / "wide", module=training.Wide, merge="best")
    assert_is_plain(of_wide)
    assert "merge=False would lose the adapters" in failing(
        tmp_path / "none", merge=False
    )
    assert "is tied, and a merge changes one use" in failing(
        tmp_path / "tied", module=training.Tied
    )

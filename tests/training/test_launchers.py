"""A fit ends with the same bits, whatever starts its processes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checks import files_hold_adapters_alone
from tests.support.faults import FORK
from tests.support.launched import main
from tests.support.models import LitTiny, same
from tests.support.versions import exact

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
LIMIT = 180.0
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
        main(*self.command)

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


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


Launcher = Callable[[Path], list[Command]]
LAUNCHED = ("-m", "tests.support.launched")
TORCHRUN = ("-m", "torch.distributed.run")


def forking(folder: Path) -> list[Command]:
    return [Program(str(folder), "--strategy=ddp_fork")]


def lightning(folder: Path) -> list[Command]:
    return [Command(*LAUNCHED, str(folder))]


def torchrun(folder: Path) -> list[Command]:
    return [Command(*TORCHRUN, "--standalone", "--nproc_per_node=2", *LAUNCHED, str(folder))]


def torchrun_on_two_nodes(folder: Path) -> list[Command]:
    options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    program = [*LAUNCHED, str(folder), "--nodes=2", "--devices=1"]
    return [Command(*TORCHRUN, *options, f"--node_rank={node}", *program) for node in range(2)]


def slurm(folder: Path, *options: str) -> list[Command]:
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "localhost", "MASTER_PORT": free_port()}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    ranks = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    return [Program(str(folder), *options, **job, **rank) for rank in ranks]


def kubeflow(folder: Path) -> list[Command]:
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    options = ["--nodes=2", "--devices=1", "--environment=KubeflowEnvironment"]
    return [Program(str(folder), *options, **job, RANK=str(pod)) for pod in range(2)]


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


def test_forked_fit_trains_and_writes_adapters_alone(forked: Path) -> None:
    assert not torch.equal(weights(forked / "through.pt")["q_proj.weight"], LitTiny().q_proj.weight)
    assert files_hold_adapters_alone(forked)


@exact
def test_resumed_fit_ends_with_the_same_bits(forked: Path) -> None:
    assert same(weights(forked / "resumed.pt"), weights(forked / "through.pt"))


WRITTEN = ("through.pt", "through/epoch=0.ckpt", "through/epoch=1.ckpt", "resumed.pt", "resumed/epoch=1.ckpt")


def differing(a: Path, b: Path) -> list[str]:
    """Which of the weights and files are not the same to the byte."""
    return [name for name in WRITTEN if (a / name).read_bytes() != (b / name).read_bytes()]


@pytest.mark.parametrize("launcher", [lightning, torchrun, torchrun_on_two_nodes, slurm, kubeflow])
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

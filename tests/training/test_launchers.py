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
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.support.models import LitTiny, exact, same
from tests.support.training import files_hold_adapters_alone

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
LIMIT = 180.0
"""Seconds for one launcher."""


@dataclass(frozen=True)
class Start:
    """A command, and the variables that a launcher sets for it."""

    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, log: Path) -> subprocess.Popen[bytes]:
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # and nothing that another launcher has set
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, *self.command],
                cwd=ROOT,
                env=environment | self.variables,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def run(folder: Path, starts: Sequence[Start]) -> None:
    """Run commands side by side, and show what they printed if one of them fails or does not end.

    Then none of them is waited for any longer.
    """
    logs = [folder / f"{number}.log" for number in range(len(starts))]
    processes = [start.run(log) for start, log in zip(starts, logs, strict=True)]
    over = time.monotonic() + LIMIT
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            if time.monotonic() > over:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its children
            process.wait()
    assert not any(codes) and None not in codes, "\n".join(log.read_text() for log in logs)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


Launcher = Callable[[Path], list[Start]]


def program(folder: Path, *options: str) -> list[str]:
    return ["-m", "tests.support.launched", str(folder), *options]


def forking(folder: Path) -> list[Start]:
    return [Start(program(folder, "--strategy=ddp_fork"))]


def lightning(folder: Path) -> list[Start]:
    return [Start(program(folder))]


def torchrun(folder: Path) -> list[Start]:
    return [Start(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program(folder)])]


def torchrun_on_two_nodes(folder: Path) -> list[Start]:
    options = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    command = program(folder, "--nodes=2", "--devices=1")
    return [Start(["-m", "torch.distributed.run", *options, f"--node_rank={node}", *command]) for node in range(2)]


def slurm(folder: Path, *options: str) -> list[Start]:
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "fit", "SLURM_NODELIST": "localhost", "MASTER_PORT": free_port()}
    job |= {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    ranks = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(2)]
    return [Start(program(folder, *options), job | rank) for rank in ranks]


def kubeflow(folder: Path) -> list[Start]:
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    command = program(folder, "--nodes=2", "--devices=1", "--environment=KubeflowEnvironment")
    return [Start(command, job | {"RANK": str(pod)}) for pod in range(2)]


def ray(folder: Path) -> list[Start]:
    return [Start(["-m", "tests.support.launched_by_ray", str(folder)])]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what all launchers give."""
    return tmp_path_factory.mktemp("launchers")


def result(results: Path, *launchers: Launcher) -> Path:
    """What one launcher gives, or several ones after each other.

    All work in the same folder, because files hold its path.
    """
    folder = results / "now"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for launcher in launchers:
        run(folder, launcher(folder))
    return folder.rename(results / launchers[-1].__name__)


@pytest.fixture(scope="module")
def forked(results: Path) -> Path:
    """What Lightning's own launcher gives that forks."""
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
    def requeued(folder: Path) -> list[Start]:
        return slurm(folder, "--requeue")

    given = result(results, requeued, requeued)
    assert same(weights(given / "through.pt"), weights(forked / "through.pt"))
    assert (given / "hpc_ckpt_1.ckpt").exists() and files_hold_adapters_alone(given)


def test_a_command_that_fails_ends_the_others_and_is_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="out of order"):
        run(tmp_path, [Start(["-c", "import time; time.sleep(600)"]), Start(["-c", "exit('out of order')"])])

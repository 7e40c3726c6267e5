"""Run a function in several processes that look as if torchrun had started them."""

import faulthandler
import io
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version

# FSDP2 on CPUs, and DTensors that are made without messages
has_shards = Version(torch.__version__) >= Version("2.7")

_PATIENCE = 60  # seconds until processes that wait for each other are ended


class RankError(AssertionError):
    """A process failed."""


def run_ranks(
    function: Callable[..., Any], *args: Any, size: int = 2, **kwargs: Any
) -> list[Any]:
    """Call a function in forked processes, and return what each returns: anything that torch can save."""
    port = free_port()
    context = multiprocessing.get_context("fork")
    function = partial(function, **kwargs)
    ends = []
    processes = []
    for rank in range(size):
        receiving, sending = context.Pipe(duplex=False)
        processes.append(
            context.Process(
                target=_child,
                args=(sending, rank, size, port, function, args),
                daemon=True,
            )
        )
        processes[-1].start()
        sending.close()
        ends.append(receiving)
    try:
        found = [_result(end, rank) for rank, end in enumerate(ends)]
    finally:
        for process in processes:
            process.kill()
            process.join()
    failed = [
        f"process {rank}:\n{text}" for rank, (text, _) in enumerate(found) if text
    ]
    # where a connection was closed or reset by its peer, the other process failed first
    if failed:
        raise RankError(min(failed, key=lambda text: "by peer" in text))
    return [value for _, value in found]


def _result(end: Connection, rank: int) -> tuple[str, Any]:
    end.poll(2 * _PATIENCE)
    try:
        found: tuple[str, Any] = torch.load(
            io.BytesIO(end.recv_bytes()), weights_only=False
        )
        return found
    except EOFError:
        return "ended without a result", None


@contextmanager
def alone() -> Iterator[Any]:
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.device_mesh.init_device_mesh(
            "cpu", (1,), mesh_dim_names=("tensor_parallel",)
        )
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return int(free.getsockname()[1])


def _child(
    end: Connection,
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    args: Any,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
    }
    os.environ |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    # torch, of a meta model's first values
    warnings.filterwarnings("ignore", "DTensor random operators may not")
    warnings.filterwarnings("ignore", ".*recommended to use `Trainer.devices=1")
    faulthandler.dump_traceback_later(_PATIENCE, exit=True)
    try:
        found = "", function(*args)
    except BaseException:
        found = traceback.format_exc(), None
    packed = io.BytesIO()
    torch.save(found, packed)
    end.send_bytes(packed.getvalue())
    end.close()
    os._exit(0)  # a process group whose other process has failed would wait for it


def join_group() -> None:
    """Join the processes in a group, as a strategy does."""
    dist.init_process_group("gloo")

"""Faults that a file or its process may have."""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_lora import LoRAError, load_adapter, load_from_checkpoint
from tests.support.models import LitTiny, as_trained, data, lora, same, state, trainer

forks = [
    pytest.mark.skipif(
        sys.platform != "linux", reason="forks, and limits what a process may write"
    ),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|quantize)"),
]

FORK: Any = multiprocessing.get_context("fork")
OURS = (LoRAError, FileNotFoundError, PermissionError)


def fork(work: Callable[[], object], seconds: float = 60) -> int:
    """Run ``work`` in a fork of this process, and fail as it fails; return the signal of its end.

    ``SIGPROF`` ends it after some seconds of CPU time, which other processes on the
    machine hardly change.
    """
    receive, send = FORK.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # the other threads did not come along
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        # what is wrong must be refused where a warning is no error
        warnings.simplefilter("ignore")
        with Path(os.devnull).open("w") as sys.stdout:
            sys.stderr = sys.stdout
            try:
                work()
            except BaseException:
                send.send(traceback.format_exc()[-20_000:])

    child = FORK.Process(target=run)
    child.start()
    send.close()
    # after so many seconds it stands still: what it computes is limited by its CPU time
    child.join(3600)
    child.kill()
    child.join()
    with suppress(EOFError):
        pytest.fail(receive.recv(), pytrace=False)
    return -int(child.exitcode)


def in_fork(test: Callable[..., None]) -> Any:
    """A test that runs in a fork, where it may limit itself."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        assert fork(partial(test, *args, **kwargs)) == 0

    for mark in (*forks, pytest.mark.processes):
        run = mark(run)
    return run


def limit(size: int, then: Any = signal.SIG_IGN) -> None:
    """From now on no file grows over ``size`` bytes: more is an error, or with ``SIG_DFL`` death between two bytes."""
    signal.signal(signal.SIGXFSZ, then)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nobody write into a folder.

    What its process may do is lost for ever: call it in a fork.
    """
    # not even for root
    ctypes.CDLL(None).capset(
        (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    )
    paths = [*folder.glob("*.*"), folder]
    for path in paths:
        path.chmod(0o555)
    yield
    for path in paths:
        path.chmod(0o755)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def kinds(model: nn.Module) -> list[Any]:
    modules = [
        (name, type(module), module.training) for name, module in model.named_modules()
    ]
    parameters = [
        (name, type(p), p.requires_grad) for name, p in model.named_parameters()
    ]
    return [*modules, *parameters]


class FailsAt(TorchFunctionMode):
    """Let one call of torch fail, or be interrupted: its place in the order of calls."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.left = place
        self.error = (
            MemoryError("no memory is left") if place % 2 else KeyboardInterrupt()
        )

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        # these compute nothing
        if name not in ("requires_grad_", "is_inference") and not name.startswith("_"):
            self.left -= 1
            if self.left == 0:
                raise self.error
        return func(*args, **(kwargs or {}))


def fails_at(place: int, call: Callable[[], object], *errors: type[Exception]) -> bool:
    """Whether ``call`` fails when its call of torch in this place does: with that error, or with one of these."""
    mode = FailsAt(place)
    try:
        with mode:
            call()
    except (MemoryError, KeyboardInterrupt, *errors):
        return True
    assert mode.left > 0
    return False


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Expect ``model`` to be afterwards what it was, bit for bit."""
    before = state(model)
    kinds_before = kinds(model)
    yield
    assert same(state(model), before)
    assert kinds(model) == kinds_before


def adapted(seed: int = 5) -> LitTiny:
    return as_trained(LitTiny(), seed, **lora().config.to_dict())


def with_trainer(stage: str, model: LitTiny, path: Path) -> None:
    t = trainer(
        path.parent, [lora(merge=False)], max_epochs=2, enable_checkpointing=False
    )
    getattr(t, stage)(model, data(), ckpt_path=path)


WAYS: dict[str, Callable[[LitTiny, Path], object]] = {
    "load_adapter": load_adapter,
    "load_from_checkpoint": lambda _, path: load_from_checkpoint(LitTiny, path),
    "fit": partial(with_trainer, "fit"),
    "test": partial(with_trainer, "test"),
}


def refused(
    path: Path, *ways: str, builds: Sequence[Callable[[], LitTiny]] = (LitTiny, adapted)
) -> None:
    """Expect ``path`` to be refused in every way in which it could be loaded, and a model to be what it was."""
    for way, build in product(ways or WAYS, builds):
        model = build()
        with unchanged(model), pytest.raises(OURS):
            WAYS[way](model, path)


def edited(path: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a checkpoint again with a change, and a checksum that is as it was."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, to)
    return to


class Runs:
    """What a pickle runs as it is loaded: it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


def put_pickle(pickled: bytes, path: Path) -> None:
    """Put another pickle into an archive of torch."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else contents)

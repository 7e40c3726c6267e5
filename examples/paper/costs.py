"""What a method costs: memory, bytes, and the time of a step.

Each in a process of its own, with one thread.
"""

import resource
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .jobs import Folders, Job, Result, build, make_trainer, prepare, quiet
from .methods import METHODS

ROUNDS, STEPS = 5, 8


class StepTimer(Callback):
    """Time each training step, in the processor's seconds: other work on the machine does not count."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Note the time."""
        self.started = time.process_time()

    def on_train_batch_end(self, *_: object) -> None:
        """Note how long the step took."""
        self.seconds.append(time.process_time() - self.started)


def costs(task: str, names: list[str], folders: Folders, *, fast: bool) -> Result:
    """Return the costs of each method."""
    jobs = [Job(task, name, METHODS[name].rates[0]) for name in names]
    measure = directly if fast else in_own_process
    found: Result = {}
    for job in jobs:
        found[job.method] = measure(once, job, folders, fast)
    for name, seconds in measure(steps, jobs, folders, fast).items():
        found[name]["step_seconds"] = seconds
    return found


def directly(function: Any, *args: Any) -> Any:
    """Call a function in this process: quick, but without a peak of memory of its own."""
    return function(*args)


def in_own_process(function: Any, *args: Any) -> Any:
    """Call a function in a new process: the peak of its memory is of its life."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def once(job: Job, folders: Folders, fast: bool) -> Result:
    """Train on the longest batches, and measure memory and bytes."""
    module, callbacks, batches = made(job, folders, fast, place=0)
    trainer = make_trainer(callbacks, max_epochs=1)
    trainer.validate(module, batches, verbose=False)
    before = peak_memory()
    trainer.fit(module, batches)
    memory = peak_memory() - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        checkpoint = path.stat().st_size
    return {
        "memory_bytes": memory,
        "optimizer_bytes": state_bytes(trainer.optimizers[0]),
        "checkpoint_bytes": checkpoint,
    }


def steps(jobs: list[Job], folders: Folders, fast: bool) -> dict[str, float]:
    """Return the median time of a step on batches of the middle.

    In each round, all methods take turns.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(1 if fast else ROUNDS):
        for job in jobs:
            timer = StepTimer()
            module, callbacks, batches = made(job, folders, fast, place=0.5)
            trainer = make_trainer([*callbacks, timer], max_epochs=1)
            trainer.fit(module, batches)
            # the first one makes the optimizer's state
            seconds[job.method] += timer.seconds[1:] or timer.seconds
    return {name: median(taken) for name, taken in seconds.items()}


def made(
    job: Job, folders: Folders, fast: bool, place: float
) -> tuple[Any, list[Callback], DataLoader[Any]]:
    """Return a job's module, its callbacks, and a few of its batches: from 0, the longest, to 1."""
    quiet()
    torch.set_num_threads(1)
    module, data, family = build(job, folders, fast)
    batches = sorted(data.train_dataloader(), key=width, reverse=True)
    first = int(place * len(batches))
    chosen: Any = batches[first : first + STEPS]
    callbacks = prepare(module, METHODS[job.method], family.WEIGHTS)
    return module, callbacks, DataLoader(chosen, batch_size=None)


def width(batch: Any) -> int:
    """Return how many tokens the rows of a batch have."""
    tokens = batch[0] if isinstance(batch, list | tuple) else batch
    return int(tokens["input_ids"].shape[1])


def state_bytes(optimizer: Optimizer) -> int:
    """Add up the tensors that an optimizer keeps."""
    total = 0
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                total += value.nbytes
    return total


def peak_memory() -> int:
    """Return the most memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

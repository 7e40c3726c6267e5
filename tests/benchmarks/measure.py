"""Measure time and memory so that results can be compared.

In each round, the methods run in random order. Only ratios within a round count.
"""

import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], object]
Times = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Args:
        goal: The largest value that meets the goal.
        spread: The middle half of the values of single rounds.
        details: The values of all methods, relative to the same baseline.
    """

    case: str
    measure: str
    value: float
    goal: float | None = None
    spread: tuple[float, float] | None = None
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """The settings of a measurement."""

    device: torch.device
    rounds: int

    def take_turns(self, runs: Mapping[str, Run], rounds: int | None = None) -> Times:
        """Time each run once per round, in seconds, after two warm-up rounds."""
        times: Times = {name: [] for name in runs}
        for turn in range(-2, rounds or self.rounds):
            for name in random.sample(list(runs), len(runs)):
                seconds = self._time(runs[name])
                if turn >= 0:
                    times[name].append(seconds)
        return times

    def _time(self, run: Run) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        gc.collect()
        gc.disable()
        try:
            wait()
            before = time.perf_counter()
            run()
            wait()
            return time.perf_counter() - before
        finally:
            gc.enable()


def ratios(times: Times, of: str, over: str) -> list[float]:
    """Return the ratio of two methods in each round."""
    return [one / other for one, other in zip(times[of], times[over], strict=True)]


def over(times: Times, floor: str) -> dict[str, float]:
    """Return the median ratio of every method to a baseline."""
    return {name: median(ratios(times, name, floor)) for name in times if name != floor}


def middle_half(values: list[float]) -> tuple[float, float]:
    low, _, high = quantiles(values, n=4)
    return low, high


def row(
    case: str,
    times: Times,
    of: str,
    against: str,
    floor: str,
    goal: float | None = None,
) -> Row:
    """Report the median ratio of two methods, and those of all methods to a baseline."""
    values = ratios(times, of, against)
    return Row(
        case,
        f"time over {against}",
        median(values),
        goal,
        middle_half(values),
        over(times, floor),
    )


def overheads(
    case: str,
    times: Times,
    of: str,
    peers: list[str],
    floor: str,
    goal: float | None = None,
) -> Row:
    """Report an overhead over the baseline, relative to the smallest overhead of some peers."""
    details = over(times, floor)
    best = min(peers, key=details.__getitem__)
    share = (details[of] - 1) / max(details[best] - 1, 1e-9)
    shares = []
    for ours, theirs in zip(
        ratios(times, of, floor), ratios(times, best, floor), strict=True
    ):
        shares.append((ours - 1) / (theirs - 1))
    return Row(
        case, f"overhead over that of {best}", share, goal, middle_half(shares), details
    )


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd keeps from a forward pass, without input and parameters."""
    saved: dict[int, int] = {}  # bytes by address

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # kept until the count is done, so that no memory is reused
    del output
    for tensor in (x, *model.parameters()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(saved.values())


def in_new_process(module: str, *args: str) -> Any:
    """Run ``python -m module args`` and return the last line of its output, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", module, *args],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def peak_growth(run: Run) -> int:
    """Return the peak growth of this process's memory during ``run``, in bytes (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field_name}")

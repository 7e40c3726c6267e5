"""Times and memory that can be compared: alternatives take turns, in shuffled order, and only ratios are looked at."""

import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
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
        case: What was done.
        measure: What the number is.
        value: The number.
        goal: It should be at most this.
        spread: The middle half of what single rounds gave.
        details: The numbers of all ways, each against the same floor.
    """

    case: str
    measure: str
    value: float
    goal: float | None = None
    spread: tuple[float, float] | None = None
    details: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Bench:
    """How everything is measured.

    Args:
        device: Where models run.
        rounds: How often each alternative has its turn.
        compiled: A mode of ``torch.compile`` in which training steps are measured too.
    """

    device: torch.device
    rounds: int
    compiled: str | None = None

    def take_turns(self, runs: Mapping[str, Run], rounds: int | None = None) -> Times:
        """Time each run once a round, in seconds, after two rounds to warm up."""
        times: Times = {name: [] for name in runs}
        for turn in range(-2, rounds or self.rounds):
            for name in random.sample(list(runs), len(runs)):
                seconds = self._time(runs[name])
                if turn >= 0:
                    times[name].append(seconds)
        return times

    def _time(self, run: Run) -> float:
        gc.collect()
        gc.disable()
        try:
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                run()
                end.record()
                torch.cuda.synchronize()
                return float(start.elapsed_time(end)) / 1e3
            before = time.perf_counter()
            run()
            return time.perf_counter() - before
        finally:
            gc.enable()


def ratios(times: Times, of: str, over: str) -> list[float]:
    """Return the ratio of two alternatives in each round."""
    return [a / b for a, b in zip(times[of], times[over], strict=True)]


def over(times: Times, floor: str) -> dict[str, float]:
    """Return the median ratio of every alternative to a floor."""
    return {name: median(ratios(times, name, floor)) for name in times if name != floor}


def middle_half(values: list[float]) -> tuple[float, float]:
    low, _, high = quantiles(values, n=4)
    return low, high


def row(case: str, times: Times, of: str, against: str, floor: str, goal: float | None = None) -> Row:
    """Report the median ratio of two alternatives, and beside it those of all to a floor."""
    values = ratios(times, of, against)
    return Row(case, f"time over {against}", median(values), goal, middle_half(values), over(times, floor))


def overheads(case: str, times: Times, of: str, peers: list[str], floor: str, goal: float | None = None) -> Row:
    """Report an overhead over the floor, against the smallest overhead of some peers."""
    details = over(times, floor)
    best = min(peers, key=details.__getitem__)
    share = (details[of] - 1) / max(details[best] - 1, 1e-9)
    rounds = [(a - 1) / (b - 1) for a, b in zip(ratios(times, of, floor), ratios(times, best, floor), strict=True)]
    return Row(case, f"overhead over that of {best}", share, goal, middle_half(rounds), details)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Return how many bytes autograd keeps from a forward pass, beside the input and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # alive until everything is counted, so that no memory is given out twice
    del output
    return sum(kept.values())


def in_new_process(module: str, *args: str) -> Any:
    """Run ``python -m module args`` and return what it prints last, as JSON."""
    done = subprocess.run([sys.executable, "-m", module, *args], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_growth(run: Run) -> int:
    """Return by how many bytes the memory of this process grows at most while ``run`` runs (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(field_name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field_name}")

"""Run the benchmarks: ``python -m tests.benchmarks [case ...]``."""

import argparse
import logging
import platform
import random
import time
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks.life import checkpoints, life
from tests.benchmarks.measure import Bench, Row
from tests.benchmarks.memory import memory
from tests.benchmarks.several import mixed, switch
from tests.benchmarks.sharded import sharded
from tests.benchmarks.steps import calls, inference, layers, whole_models
from tests.benchmarks.sweep import sweep

CASES = {
    "models": whole_models,
    "layers": layers,
    "memory": memory,
    "inference": inference,
    "calls": calls,
    "mixed": mixed,
    "switch": switch,
    "sweep": sweep,
    "life": life,
    "checkpoints": checkpoints,
    "sharded": sharded,
}


def main() -> None:
    cases = "\n".join(f"  {name:10} {case.__doc__}" for name, case in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=f"{__doc__}\n\ncases:\n{cases}",
        epilog="Goals are this project's own. A ✗ marks a goal that is missed. The last column shows every method\n"
        "relative to the baseline (the frozen model, or peft if no frozen model is measured), or in the row's unit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="case", help="the cases to measure (all by default)")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each method (at least 2; 9 by default)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    asked = parser.parse_args()
    unknown = [name for name in asked.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}: expected some of {', '.join(CASES)}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench = Bench(torch.device(asked.device), asked.rounds)
    console = Console(width=150)
    console.print(machine(bench))
    for name in asked.cases or CASES:
        start = time.monotonic()
        with console.status(name):
            found = list(CASES[name](bench))
        console.print(table(f"{name} ({(time.monotonic() - start) / 60:.0f} minutes)", found))


def table(title: str, rows: Iterable[Row]) -> Table:
    """Make a table for a terminal: each value, its goal, and all methods."""
    made = Table("case", "measure", "ours", "middle half", "goal", "", "all methods", title=title)
    for row in rows:
        spread = "" if row.spread is None else f"{row.spread[0]:.3g} – {row.spread[1]:.3g}"
        goal = "" if row.goal is None else f"≤ {row.goal:g}"
        met = "" if row.goal is None else "[green]✓[/]" if row.value <= row.goal else "[red]✗[/]"
        details = " · ".join(f"{name} {value:.3f}" for name, value in row.details.items())
        made.add_row(row.case, row.measure, f"{row.value:.4g}", spread, goal, met, details)
    return made


def machine(bench: Bench) -> str:
    """Describe the machine, the settings and the package versions."""
    device = platform.processor()
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_name(bench.device)
    elif (cpus := Path("/proc/cpuinfo")).exists():
        device = next((line[12:].strip() for line in cpus.read_text().splitlines() if "model name" in line), device)
    versions = [f"{name} {version(name)}" for name in ("torch", "lightning", "transformers", "peft", "loralib")]
    return f"{device}, {torch.get_num_threads()} threads, {bench.rounds} rounds, {', '.join(versions)}"


if __name__ == "__main__":
    main()

"""Run the benchmarks: ``python -m tests.benchmarks [case ...]``."""

import argparse
import logging
import platform
import random
import re
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
    """Measure the cases that are asked for, and print a table of each."""
    asked = arguments()
    be_quiet_and_the_same_each_time()
    bench = Bench(torch.device(asked.device), asked.rounds)
    console = Console(width=150)
    console.print(machine(bench))
    for name in asked.cases or CASES:
        start = time.monotonic()
        with console.status(name):
            found = list(CASES[name](bench))
        minutes = (time.monotonic() - start) / 60
        console.print(table(f"{name} ({minutes:.0f} minutes)", found))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    cases = "\n".join(f"  {name:10} {case.__doc__}" for name, case in CASES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=f"{__doc__}\n\ncases:\n{cases}",
        epilog="Goals are this project's own. A ✗ marks a goal that is missed. The last column shows every method\n"
        "relative to the baseline (the frozen model, or peft if no frozen model is "
        "measured), or in the row's unit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "cases", nargs="*", metavar="case", help="the cases to measure (all by default)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=9,
        help="runs of each method (at least 2; 9 by default)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    asked = parser.parse_args()
    unknown = [name for name in asked.cases if name not in CASES]
    if unknown:
        parser.error(
            f"unknown case {', '.join(unknown)}: expected some of {', '.join(CASES)}"
        )
    return asked


def be_quiet_and_the_same_each_time() -> None:
    """Measure with one thread and with the same random numbers, without warnings and logs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def table(title: str, rows: Iterable[Row]) -> Table:
    """Make a table for a terminal: each value, its goal, and all methods."""
    made = Table(
        "case", "measure", "ours", "middle half", "goal", "", "all methods", title=title
    )
    for row in rows:
        details = " · ".join(
            f"{name} {value:.3f}" for name, value in row.details.items()
        )
        made.add_row(
            row.case,
            row.measure,
            f"{row.value:.4g}",
            spread_of(row),
            *goal_of(row),
            details,
        )
    return made


def spread_of(row: Row) -> str:
    """The middle half of the values, if there were several."""
    if row.spread is None:
        return ""
    low, high = row.spread
    return f"{low:.3g} – {high:.3g}"


def goal_of(row: Row) -> tuple[str, str]:
    """The goal, and whether it is met."""
    if row.goal is None:
        return "", ""
    mark = "[green]✓[/]" if row.value <= row.goal else "[red]✗[/]"
    return f"≤ {row.goal:g}", mark


def machine(bench: Bench) -> str:
    """Describe the machine, the settings and the package versions."""
    device = processor()
    if bench.device.type == "cuda":
        device = torch.cuda.get_device_name(bench.device)
    versions = [
        f"{name} {version(name)}"
        for name in ("torch", "lightning", "transformers", "peft", "loralib")
    ]
    return (
        f"{device}, {torch.get_num_threads()} threads, {bench.rounds} rounds, "
        f"{', '.join(versions)}"
    )


def processor() -> str:
    """The name of the processor: on Linux, as the kernel says it."""
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        names = re.findall(r"model name\s*: (.*)", cpus.read_text())
        if names:
            return str(names[0])
    return platform.processor()


if __name__ == "__main__":
    main()

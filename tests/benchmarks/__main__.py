"""Run the benchmarks: ``python -m tests.benchmarks [case ...]``."""

import argparse
import logging
import random
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console

from tests.benchmarks.calls import calls
from tests.benchmarks.life import checkpoints, life
from tests.benchmarks.measure import Bench
from tests.benchmarks.memory import memory
from tests.benchmarks.report import machine, table, write
from tests.benchmarks.sharded import sharded
from tests.benchmarks.steps import inference, layers, whole_models

CASES = {
    "models": whole_models,
    "layers": layers,
    "memory": memory,
    "inference": inference,
    "calls": calls,
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
    parser.add_argument("--threads", type=int, default=1, help="number of torch threads (1 by default)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compiled", metavar="MODE", help="also measure compiled steps: default, reduce-overhead, ...")
    parser.add_argument("--output", type=Path, help="a file for the results, as JSON")
    asked = parser.parse_args()
    unknown = [name for name in asked.cases if name not in CASES]
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}: expected some of {', '.join(CASES)}")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench, console, rows = Bench(torch.device(asked.device), asked.rounds, asked.compiled), Console(width=150), []
    console.print(machine(bench))
    for name in asked.cases or CASES:
        found, start = [], time.monotonic()
        with console.status(name) as status:
            for row in CASES[name](bench):
                found.append(row)
                status.update(f"{name}: after {row.case}")
        console.print(table(f"{name} ({(time.monotonic() - start) / 60:.0f} minutes)", found))
        rows += found
        if asked.output:
            write(rows, bench, asked.output)


if __name__ == "__main__":
    main()

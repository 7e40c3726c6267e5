"""Measure, print and write: ``python -m tests.benchmarks [case ...]``."""

import argparse
import logging
import random
import warnings
from pathlib import Path

import torch
from rich.console import Console

from tests.benchmarks.inference import inference
from tests.benchmarks.measure import Bench
from tests.benchmarks.memory import memory
from tests.benchmarks.report import machine, table, write
from tests.benchmarks.steps import layers, whole_models
from tests.benchmarks.sweeps import sweeps
from tests.benchmarks.trainer import trainer
from tests.benchmarks.verbs import verbs

CASES = {
    "models": whole_models,
    "layers": layers,
    "memory": memory,
    "inference": inference,
    "verbs": verbs,
    "trainer": trainer,
    "sweeps": sweeps,
}

_WIDTH = 150
"""Columns of the tables, also where the output goes into a file."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="case", help=f"some of {', '.join(CASES)}; all by default")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each alternative (at least 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compiled", metavar="MODE", help="measure compiled steps too: default, reduce-overhead, ...")
    parser.add_argument("--output", type=Path, help="a folder for results.json and the pictures")
    asked = parser.parse_args()
    unknown = [name for name in asked.cases if name not in CASES]
    if unknown:
        parser.error(f"there is no case {', '.join(unknown)}: expected some of {', '.join(CASES)}")
    if asked.rounds < 2:
        parser.error(f"--rounds {asked.rounds} shows no spread: expected 2 or more")
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {asked.device}, and torch finds no CUDA device")
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    random.seed(0)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench, console, rows = Bench(torch.device(asked.device), asked.rounds, asked.compiled), Console(width=_WIDTH), []
    console.print(machine(bench))
    for name in asked.cases or CASES:
        with console.status(name):
            found = list(CASES[name](bench))
        console.print(table(name, found))
        rows += found
    if asked.output:
        write(rows, bench, asked.output)
        console.print(f"Written to {asked.output}.")


if __name__ == "__main__":
    main()

"""Show results as a table and as JSON."""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tests.benchmarks.measure import Bench, Row


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


def machine(bench: Bench) -> dict[str, Any]:
    """Describe the machine, the settings and the package versions."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    card = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else None
    packages = ("torch", "lightning", "transformers", "peft", "loralib")
    return {
        "device": card or cpu,
        "threads": torch.get_num_threads(),
        "rounds": bench.rounds,
        "versions": {name: version(name) for name in packages},
        "allocator": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write(rows: list[Row], bench: Bench, path: Path) -> None:
    """Write all rows as JSON, with the machine."""
    path.write_text(json.dumps({"machine": machine(bench), "rows": [asdict(row) for row in rows]}, indent=1))

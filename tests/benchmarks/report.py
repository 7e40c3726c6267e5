"""Show results as a table, as JSON and as plots."""

import json
import os
import platform
import re
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from tests.benchmarks.measure import Bench, Row
from tests.benchmarks.ways import OURS


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
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
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


def write(rows: list[Row], bench: Bench, folder: Path) -> None:
    """Write ``results.json``, and plots of sweeps, memory, processes and the life of a fit."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine(bench), "rows": [row.as_dict() for row in rows]}
    (folder / "results.json").write_text(json.dumps(results, indent=1))
    sweeps: dict[str, list[Row]] = {}
    for row in rows:
        if row.case.startswith("sweep over "):
            sweeps.setdefault(row.case.removeprefix("sweep over "), []).append(row)
    for title, points in sweeps.items():
        _plot(title, points, folder / f"{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}.png")
    moments: dict[str, list[Row]] = {}
    for row in rows:
        moment, _, size = row.case.partition(", base of ")
        if size:
            moments.setdefault(moment, []).append(row)
    if moments:
        _life(moments, folder / "life.png")
    kept = [row for row in rows if row.case.startswith("kept for backward")]
    if kept:
        prefix = "kept for backward beyond x, d=768, "
        _bars("bytes kept for backward besides x, as a share of x", "share of x", prefix, kept, folder / "memory.png")
    prefix = "2 processes, "
    held = [row for row in rows if row.case.startswith((f"{prefix}held", f"{prefix}a step:"))]
    if held:
        _bars("what a process holds, and sends in a step", "MB", prefix, held, folder / "sharded.png")


def _plot(title: str, points: list[Row], path: Path) -> None:
    axes, save = _axes()
    for name in points[0].details:
        style: dict[str, Any] = {"linestyle": "--" if "always" in name else "-"}
        style |= {"linewidth": 2.5, "zorder": 3} if name == OURS else {}
        values = [point.details[name] for point in points]
        axes.plot([float(p.measure) for p in points], values, marker="o", markersize=4, label=name, **style)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel=title, ylabel="step time relative to the frozen layer", title=f"Overhead by {title}")
    axes.set_xticks([float(p.measure) for p in points], [p.measure for p in points])
    axes.minorticks_off()
    save(path)


def _life(moments: dict[str, list[Row]], path: Path) -> None:
    axes, save = _axes()
    for moment, rows in moments.items():
        sizes = [float(row.case.rpartition(" base of ")[2].removesuffix(" M")) for row in rows]
        axes.plot(sizes, [max(row.details["s"], 1e-3) for row in rows], marker="o", label=moment)
    axes.set(xscale="log", yscale="log", xlabel="parameters of the base, in millions", ylabel="seconds")
    axes.set(title="What the callback adds to a Trainer, beside the steps")
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    save(path)


def _bars(title: str, unit: str, prefix: str, rows: list[Row], path: Path) -> None:
    names = list(rows[-1].details)  # the last rows are in half precision, with more methods
    axes, save = _axes()
    for place, name in enumerate(names):
        at = [i + (place - (len(names) - 1) / 2) * 0.2 for i in range(len(rows)) if name in rows[i].details]
        bars = axes.bar(at, [row.details[name] for row in rows if name in row.details], width=0.18, label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=7)
    axes.set_xticks(range(len(rows)), [row.case.removeprefix(prefix).replace(": ", "\n") for row in rows])
    axes.tick_params(axis="x", labelsize=8)
    axes.set(ylabel=unit, title=title[0].upper() + title[1:])
    save(path)


def _axes() -> tuple[Any, Callable[[Path], None]]:
    """Return empty axes and a function that saves them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)

    def save(path: Path) -> None:
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130)
        plt.close(figure)

    return axes, save

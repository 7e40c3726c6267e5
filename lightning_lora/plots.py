"""Pictures of runs, drawn from the files of Lightning's CSVLogger.

matplotlib draws them. It comes with the extra ``plots``, and is imported when something
is drawn.
"""

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.errors import ConfigError, listed
from lightning_lora.measured import measured_matrices
from lightning_lora.tables import split_at_blocks

_MOST_NUMBERS = 200  # in a heat map with more cells, they would not be legible


def plot_losses(
    runs: Mapping[str, str | Path] | str | Path,
    metric: str = "val_loss",
    *,
    window: int = 1,
    ax: Any = None,
) -> tuple[Any, Any]:
    """Draw a metric of one run or several, as lines over the steps.

    Args:
        runs: What each line is called, and its run: the folder of a ``CSVLogger`` (the
            newest version in it counts), or a ``metrics.csv``. Or one run alone.
        metric: A name that the runs logged, such as ``"train_loss"``,
            ``"val_accuracy"`` or ``"lora/update_norm"``.
        window: Each point is the mean of so many values, up to its own. The losses of
            single batches need 10 or more.
        ax: The axes to draw into. None: a new figure.

    Returns:
        The figure and its axes, of matplotlib.

    Raises:
        ConfigError: a run did not log the metric, ``runs`` are neither named nor a
            single one, or ``window`` is less than 1.
        FileNotFoundError: a folder has no ``metrics.csv``.
        ModuleNotFoundError: matplotlib is missing.

    Example:
        >>> import lightning_lora.plots
        >>> def compare():
        ...     runs = {"LoRA": "runs/lora", "full": "runs/full"}
        ...     return lightning_lora.plots.plot_losses(runs, "train_loss", window=20)
    """
    if window < 1:
        raise ConfigError(f"window={window!r} is not valid. Expected at least 1.")
    curves = {}
    for name, run in _named(runs).items():
        curves[name] = _curve(_metrics_file(run), metric)
    figure, ax = _axes(ax)
    for name, (steps, values) in curves.items():
        marker = "o" if len(values) < 25 else None
        ax.plot(steps, _means(values, window), label=name, marker=marker, markersize=4)
    mean = f" (mean of {window})" if window > 1 else ""
    ax.set(xlabel="step", ylabel=metric + mean)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure, ax


def plot_layers(run: str | Path, model: nn.Module | None = None) -> tuple[Any, Any]:
    """Draw what each layer learned, as two heat maps.

    One shows the norms of the updates, the other their effective ranks, as they were
    logged last. The norms are absolute; ``UpdateNorm`` divides by the norm of the
    weight. Rows are blocks of the model, columns are the matrices of a block. The run
    needs ``LoRAMonitor(per_layer=True)`` and a ``CSVLogger``.

    Args:
        run: The folder of a ``CSVLogger`` (the newest version in it counts), or a
            ``metrics.csv``.
        model: The model with these adapters, also if it is merged: columns are in its
            order. None: by their names, as a ``CSVLogger`` sorts them.

    Returns:
        The figure and its two axes, of matplotlib.

    Raises:
        ConfigError: the run has no numbers of layers.
        AdapterStateError: ``model`` has no adapters.
        FileNotFoundError: the folder has no ``metrics.csv``.
        ModuleNotFoundError: matplotlib is missing.
    """
    file = _metrics_file(run)
    step, norms = _last_by_layer(file, "lora/update_norm/")
    _, ranks = _last_by_layer(file, "lora/effective_rank/")
    if model is not None:
        order = list(measured_matrices(model))
        norms = _in_order(norms, order)
        ranks = _in_order(ranks, order)
    norm_map = _heat_map(norms)
    rank_map = _heat_map(ranks)
    figure, axes = _pyplot().subplots(
        1, 2, layout="constrained", figsize=_size_of_two(norm_map)
    )
    _draw_heat_map(
        axes[0],
        norm_map,
        "Norm of the update (absolute)",
        least=0,
        decimals=_decimals(norms.values()),
    )
    _draw_heat_map(axes[1], rank_map, "Effective rank", least=1, decimals=1)
    figure.suptitle(
        f"What each layer learned, logged at step {step}", fontsize="medium"
    )
    return figure, axes


# matplotlib


def _pyplot() -> Any:
    """matplotlib.pyplot, or an error that says where it comes from."""
    try:
        return import_module("matplotlib.pyplot")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Pictures are drawn with matplotlib, which is not installed. It comes with the extra 'plots': "
            "pip install '.[plots]' in a clone of lightning_lora, or pip install "
            "matplotlib."
        ) from error


def _axes(ax: Any) -> tuple[Any, Any]:
    """These axes with their figure, or new ones."""
    if ax is not None:
        return ax.figure, ax
    figure, ax = _pyplot().subplots(layout="constrained", figsize=(6, 3.6))
    return figure, ax


# Files of CSVLogger


def _named(runs: Any) -> Mapping[str, str | Path]:
    """Runs by what they are called. A single one has its path as its name."""
    if isinstance(runs, str | Path):
        return {str(runs): runs}
    if not isinstance(runs, Mapping) or not runs:
        raise ConfigError(
            f"runs={runs!r} is not valid. Expected a dict of names and runs, such as "
            "{'LoRA': 'runs/lora'}, or the folder of one run."
        )
    return runs


def _metrics_file(run: str | Path) -> Path:
    """The metrics.csv of a run: of its newest version, if the folder has several."""
    path = Path(run)
    if path.is_file():
        return path
    files = list(path.rglob("metrics.csv"))
    if not files:
        raise FileNotFoundError(
            f"{path} has no metrics.csv. Expected the folder of a CSVLogger, or its "
            "metrics.csv."
        )
    logged = {str(file.parent.parent) for file in files}
    if len(logged) > 1:
        raise ConfigError(
            f"{path} has several runs: {listed(sorted(logged))}. Give the folder of "
            "one of them."
        )
    return max(files, key=_version)


def _version(file: Path) -> tuple[int, str]:
    """A key for files of folders such as ``version_9``: version_10 comes behind it."""
    numbers = re.findall(r"\d+$", file.parent.name)
    return (int(numbers[0]) if numbers else -1), file.parent.name


def _rows(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv. What was not logged at a step is empty there."""
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    for number, row in enumerate(rows, 2):
        if None in row:  # csv's key for cells behind the last column
            raise ConfigError(
                f"Line {number} of {file} has more cells than its first line. Expected "
                "a file of CSVLogger."
            )
    return rows


def _number(file: Path, row: Mapping[str, str], column: str) -> float:
    """The number in a cell."""
    cell = row.get(column)
    try:
        return float(cell or "")
    except ValueError:
        raise ConfigError(
            f"{file} has {column}={cell!r}. Expected a number, as CSVLogger writes it."
        ) from None


def _curve(file: Path, metric: str) -> tuple[list[int], list[float]]:
    """The steps at which a metric was logged, and its values."""
    rows = _rows(file)
    steps = []
    values = []
    for row in rows:
        if row.get(metric):
            steps.append(int(_number(file, row, "step")))
            values.append(_number(file, row, metric))
    if not steps:
        columns = rows[0] if rows else {}
        others = sorted(columns.keys() - {"epoch", "step"})
        raise ConfigError(
            f"metric={metric!r} is not in {file}. It has "
            f"{listed(others, 10) or 'no metrics'}."
        )
    return steps, values


def _last_by_layer(file: Path, beginning: str) -> tuple[str, dict[str, float]]:
    """The last step with a metric of LoRAMonitor, and the numbers of each layer there."""
    for row in reversed(_rows(file)):
        found = {}
        for name, value in row.items():
            if name.startswith(beginning) and value:
                found[name.removeprefix(beginning)] = _number(file, row, name)
        if found:
            return row.get("step", "?"), found
    raise ConfigError(
        f"{file} has no numbers of single layers. LoRAMonitor(per_layer=True) logs "
        "them."
    )


# Numbers to draw


def _means(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and of those before it, as far as the window goes."""
    means = []
    for end in range(1, len(values) + 1):
        seen = values[max(0, end - window) : end]
        means.append(sum(seen) / len(seen))
    return means


def _in_order(by_layer: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """The same numbers, in the order of the names. Those of other layers come last."""
    first = {name: by_layer[name] for name in names if name in by_layer}
    return {**first, **by_layer}


def _decimals(values: Iterable[float]) -> int:
    """How many decimals give three digits to the largest number."""
    largest = max((value for value in values if math.isfinite(value)), default=0)
    if largest <= 0:
        return 2
    return max(0, 2 - math.floor(math.log10(largest)))


class _HeatMap(NamedTuple):
    """Numbers of layers: a row for each block, a column for each matrix.

    Where a block lacks a matrix, it is NaN.
    """

    rows: list[str]
    columns: list[str]
    values: list[list[float]]


def _heat_map(by_layer: Mapping[str, float]) -> _HeatMap:
    """The numbers by block and matrix: ``encoder.3.query`` is in row 3, in the column ``query``."""
    cells = {}
    for name, value in by_layer.items():
        cells[split_at_blocks(name)] = value
    blocks = sorted({block for block, _ in cells})
    matrices = list(dict.fromkeys(matrix for _, matrix in cells))
    values = []
    for block in blocks:
        row = [cells.get((block, matrix), math.nan) for matrix in matrices]
        values.append(row)
    rows = [".".join(map(str, block)) for block in blocks]
    return _HeatMap(rows, _without_common_beginning(matrices), values)


def _without_common_beginning(names: Iterable[str]) -> list[str]:
    """Names without the components that all begin with.

    A number says nothing alone: it keeps the component before it, as in ``body.0``.
    """
    parts_of_names = [name.split(".") for name in names]
    owners = [parts[:-1] for parts in parts_of_names]
    common = 0
    for components in zip(*owners, strict=False):
        if len(set(components)) > 1:
            break
        common += 1
    while common and _has_number_at(common, parts_of_names):
        common -= 1
    return [".".join(parts[common:]) for parts in parts_of_names]


def _has_number_at(place: int, parts_of_names: Iterable[Sequence[str]]) -> bool:
    """Whether one of these names has a number there, or the star of a block."""
    components = [parts[place] for parts in parts_of_names]
    return any(part.isdecimal() or part == "*" for part in components)


def _size_of_two(heat_map: _HeatMap) -> tuple[float, float]:
    """The size of a figure with two such heat maps side by side, which have labels below them."""
    longest_label = max(map(len, heat_map.columns))
    width = 2 * (2 + 0.6 * len(heat_map.columns))
    height = 1.2 + 0.36 * len(heat_map.rows) + 0.075 * longest_label
    return max(8, width), max(3, height)


def _draw_heat_map(
    ax: Any, heat_map: _HeatMap, title: str, *, least: float, decimals: int
) -> None:
    """Draw a heat map with a number in each cell, and its colour bar."""
    image = ax.imshow(heat_map.values, vmin=least, cmap="viridis", aspect="auto")
    ax.set_title(title, fontsize="medium")
    has_blocks = heat_map.rows != [""]
    ax.set_ylabel("block" if has_blocks else "")
    rows = heat_map.rows if has_blocks else []
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xticks(
        range(len(heat_map.columns)), heat_map.columns, rotation=90, fontsize="small"
    )
    ax.figure.colorbar(image, ax=ax)
    if len(heat_map.rows) * len(heat_map.columns) > _MOST_NUMBERS:
        return
    for row, values in enumerate(heat_map.values):
        for column, value in enumerate(values):
            is_dark = image.norm(value) < 0.6
            text = "" if math.isnan(value) else f"{value:.{decimals}f}"
            style = {"color": "white" if is_dark else "black", "fontsize": "x-small"}
            ax.text(column, row, text, ha="center", va="center", **style)

"""What a file of adapters holds, shown in a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import counted
from lightning_lora.printing import fitting_console, printable
from lightning_lora.tables import LayerName, grouped_by_name, layer_table, shown_range

# What is said of a file, in types that JSON has: ``inspect --json`` prints these keys

DescribedLayer = TypedDict(
    "DescribedLayer",
    {
        "name": str,
        "class": str,  # with its package
        "parts": list[str],  # the names of its matrices, if it has several
        "r": int,
        "scaling": float,
        "shapes": dict[str, list[int]],  # of its weights, by name in it
        "norm": float,  # of all its updates together
        "effective_rank": float,  # the mean of its updates
    },
)


class DescribedTensor(TypedDict):
    """A tensor that is no adapter's."""

    shape: list[int]
    dtype: str


class DescribedBase(TypedDict):
    """The base that the adapters were trained on."""

    tensors: int  # how many are frozen
    dtypes: list[str]
    name: str  # the repository or folder of the one model inside, or nothing


class DescribedFile(TypedDict):
    """What a file of adapters holds."""

    file: str
    bytes: int
    format: int  # the version of its description
    root: str  # the name of the one model inside, or nothing
    base: DescribedBase
    config: dict[str, Any]
    layers: list[DescribedLayer]
    tokens: dict[str, list[int]]  # the rows that train, of each embedding
    beside: dict[str, DescribedTensor]
    metrics: dict[str, float]


def show(found: DescribedFile) -> None:
    """Print what a file holds: a table of its layers, then a line for all else."""
    console = fitting_console()
    console.print(_table(found))
    if found["beside"]:
        line = _line_of_others(found["beside"])
        console.print(printable(line), soft_wrap=True, markup=False)
    console.print(printable(_line_of_base(found)), markup=False)
    line = _line_of_arguments(found["config"])
    console.print(printable(line), soft_wrap=True, markup=False)
    if found["metrics"]:
        line = _line_of_metrics(found["metrics"])
        console.print(printable(line), soft_wrap=True, markup=False)


def _table(found: DescribedFile) -> Table:
    """A table with a row for each group of like layers."""
    layers = {layer["name"]: layer for layer in found["layers"]}
    size = decimal(found["bytes"])
    adapted = counted(len(layers), "adapted layer")
    title = f"{found['file']}: {size}, {adapted}"
    table = layer_table("r", "scaling", "norm\nof ΔW", "effective\nrank", title=title)
    for title_of_group, group in grouped_by_name(layers, _common_of_layers):
        cells = _cells(title_of_group, list(group.values()))
        table.add_row(*cells)
    return table


def _common_of_layers(layer: DescribedLayer) -> str:
    """What layers of one group have in common."""
    return str([layer["class"], layer["r"], layer["scaling"], layer["shapes"]])


def _cells(title: str, group: Sequence[DescribedLayer]) -> tuple[RenderableType, ...]:
    """The row of a group."""
    first = group[0]
    if len(group) > 1:
        title = f"{title} (×{len(group)})"
    _, _, class_name = first["class"].rpartition(".")
    r = str(first["r"])
    scaling = f"{first['scaling']:g}"
    norm = _range_of([layer["norm"] for layer in group])
    rank = _range_of([layer["effective_rank"] for layer in group])
    return LayerName(title), LayerName(class_name), r, scaling, norm, rank


def _range_of(values: Sequence[float]) -> str:
    """The least and the greatest of these numbers, as they are shown."""
    least = f"{min(values):.3g}"
    greatest = f"{max(values):.3g}"
    return shown_range(least, greatest)


def _line_of_others(described: Mapping[str, DescribedTensor]) -> str:
    """The tensors besides adapters, each with its shape."""
    texts = list[str]()
    for name, value in described.items():
        texts.append(f"{name} {value['shape']}")
    return f"Besides adapters: {', '.join(texts)}"


def _line_of_base(found: DescribedFile) -> str:
    """What the adapters were trained on, and which single rows of it."""
    count = found["base"]["tensors"]
    dtypes = ", ".join(found["base"]["dtypes"])
    line = f"Base: {count} frozen tensors, {dtypes}."
    if found["base"]["name"]:
        line += f" They came from {found['base']['name']!r}."
    for name, rows in found["tokens"].items():
        line += f" Rows of {name} train: {len(rows)}."
    return line


def _line_of_arguments(config: Mapping[str, Any]) -> str:
    """The arguments that differ from the defaults, and those that are always shown."""
    always_shown = ("r", "alpha", "target_modules")
    usual = LoRAConfig().to_dict()
    given = list[str]()
    for key, value in config.items():
        if key in always_shown or value != usual[key]:
            given.append(f"{key}={value!r}")
    return f"Arguments: {', '.join(given)}"


def _line_of_metrics(metrics: Mapping[str, float]) -> str:
    """The metrics that the run logged last before it wrote the file."""
    texts = [f"{name} {value:.4g}" for name, value in metrics.items()]
    return f"Logged last: {', '.join(texts)}"

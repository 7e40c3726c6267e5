"""Show what a file of adapters holds.

For each group of layers: the rank, the scaling, the norm of the update, and
how many of its directions count (effective rank, the mean of q, k and v).
Then what the file holds besides adapters, and the base they were trained on.

examples::

  lightning-lora inspect adapter.safetensors
  lightning-lora inspect last.ckpt --json | jq '.layers[0]'
"""

import json
from collections.abc import Sequence
from os import SEEK_END
from typing import Any

from rich.console import RenderableType
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import counted
from lightning_lora.functional.subspace import directions, effective_rank
from lightning_lora.printing import fitting_console, printable
from lightning_lora.storage.disk import opened
from lightning_lora.storage.inner_model import UNKNOWN
from lightning_lora.storage.offline.layers import besides, matrix_updates, read_layers
from lightning_lora.storage.stored import FORMAT, StoredAdapters
from lightning_lora.tables import LayerName, grouped_by_name, layer_table, shown_range
from lightning_lora.tensors.dicts import of_type

Plain = dict[str, Any]
"""What is said of something, in types that JSON has."""


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("file", help="a .safetensors or .ckpt file with adapters")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every layer")


def run(arguments: Any) -> None:
    """Read the file and print what it holds."""
    found = inspect(read_layers(arguments.file))
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)


def inspect(stored: StoredAdapters) -> Plain:
    """Return what a file holds, in plain types."""
    base = stored.base[0]
    layers: list[Plain] = []
    rows = dict[str, list[int]]()
    for name, layer in stored.layers.items():
        if layer.tokens:  # they are no update: the base's rows are not in the file
            rows[name] = list(layer.tokens)
        else:
            layers.append(_describe_layer(stored, name))
    return {
        "file": stored.source,
        "bytes": _size_of(stored.source),
        "format": FORMAT,
        "root": stored.root,
        "base": {"tensors": len(base["digests"]), "dtypes": base["dtypes"], "name": _name_of_base(stored)},
        "config": stored.config.to_dict(),
        "layers": layers,
        "tokens": rows,
        "beside": _describe_others(stored),
        "metrics": stored.metrics,
    }


def _name_of_base(stored: StoredAdapters) -> str:
    """The repository or folder that the one model inside came from. Empty: the file does not say it."""
    return stored.modules.get(stored.root, UNKNOWN).pretrained


def _size_of(source: str) -> int:
    """The bytes of a file, or of what a URL names."""
    with opened(source) as file:
        size: int = file.seek(0, SEEK_END)
    return size


def _describe_layer(stored: StoredAdapters, name: str) -> Plain:
    """One layer: what it is, and the size of its update."""
    layer = stored.layers[name]
    updates = matrix_updates(stored, name)
    squared_norms = list[float]()
    ranks = list[float]()
    for update in updates.values():
        _, sizes, _ = directions(update)
        squared_norms.append(sizes.square().sum().item())
        ranks.append(effective_rank(sizes).mean().item())
    return {
        "name": name,
        "class": layer.layer_class,
        "parts": [matrix.name for matrix in layer.matrices if matrix.name],
        "r": layer.r,
        "scaling": layer.scaling,
        "shapes": {weight: list(shape) for weight, shape in layer.shapes.items()},
        "norm": sum(squared_norms) ** 0.5,
        "effective_rank": sum(ranks) / len(ranks),
    }


def _describe_others(stored: StoredAdapters) -> Plain:
    """The shape and dtype of each tensor that is no adapter's."""
    described: Plain = {}
    for name, tensor in of_type(besides(stored), Tensor).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        described[name] = {"shape": list(tensor.shape), "dtype": dtype}
    return described


# For a terminal


def _show(found: Plain) -> None:
    """Print what a file holds: a table of its layers, then a line for all else."""
    console = fitting_console()
    console.print(_table(found))
    if found["beside"]:
        line = _line_of_others(found["beside"])
        console.print(printable(line), soft_wrap=True, markup=False)
    console.print(printable(_line_of_base(found)), markup=False)
    console.print(_line_of_arguments(found["config"]), soft_wrap=True, markup=False)
    if found["metrics"]:
        line = _line_of_metrics(found["metrics"])
        console.print(printable(line), soft_wrap=True, markup=False)


def _table(found: Plain) -> Table:
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


def _common_of_layers(layer: Plain) -> str:
    """What layers of one group have in common."""
    common = [layer[key] for key in ("class", "r", "scaling", "shapes")]
    return str(common)


def _cells(title: str, group: Sequence[Plain]) -> tuple[RenderableType, ...]:
    """The row of a group."""
    first = group[0]
    if len(group) > 1:
        title = f"{title} (×{len(group)})"
    _, _, class_name = first["class"].rpartition(".")
    r = str(first["r"])
    scaling = f"{first['scaling']:g}"
    norm = _range_of("norm", group)
    rank = _range_of("effective_rank", group)
    return LayerName(title), LayerName(class_name), r, scaling, norm, rank


def _range_of(key: str, group: Sequence[Plain]) -> str:
    """The least and the greatest number in a group, as they are shown."""
    values = [layer[key] for layer in group]
    least = f"{min(values):.3g}"
    greatest = f"{max(values):.3g}"
    return shown_range(least, greatest)


def _line_of_others(described: Plain) -> str:
    texts = list[str]()
    for name, value in described.items():
        texts.append(f"{name} {value['shape']}")
    return f"Besides adapters: {', '.join(texts)}"


def _line_of_base(found: Plain) -> str:
    """What the adapters were trained on, and which single rows of it."""
    count = found["base"]["tensors"]
    dtypes = ", ".join(found["base"]["dtypes"])
    line = f"Base: {count} frozen tensors, {dtypes}."
    if found["base"]["name"]:
        line += f" They came from {found['base']['name']}."
    for name, rows in found["tokens"].items():
        line += f" Rows of {name} train: {len(rows)}."
    return line


def _line_of_arguments(config: Plain) -> str:
    """The arguments that differ from the defaults, and those that are always shown."""
    always_shown = ("r", "alpha", "target_modules")
    usual = LoRAConfig().to_dict()
    given = list[str]()
    for key, value in config.items():
        if key in always_shown or value != usual[key]:
            given.append(f"{key}={value!r}")
    return f"Arguments: {', '.join(given)}"


def _line_of_metrics(metrics: Plain) -> str:
    """The metrics that the run logged last before it wrote the file."""
    texts = [f"{name} {value:.4g}" for name, value in metrics.items()]
    return f"Logged last: {', '.join(texts)}"

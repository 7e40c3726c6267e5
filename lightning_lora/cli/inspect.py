"""Show what a file of adapters holds.

For each group of layers: the rank, the scaling, the norm of the update, and
how many of its directions count (effective rank, the mean of q, k and v).
Then what the file holds besides adapters, and the base they were trained on.

examples::

  lightning-lora inspect adapter.safetensors
  lightning-lora inspect last.ckpt --json | jq '.layers[0]'
"""

import json
from os import SEEK_END
from typing import Any

import torch
from rich.filesize import decimal

from lightning_lora.config import LoRAConfig
from lightning_lora.functional.subspace import directions, effective_rank
from lightning_lora.printing import fitting_console, printable
from lightning_lora.storage.disk import opened
from lightning_lora.storage.offline.layers import besides, matrix_updates, read_layers
from lightning_lora.storage.stored import FORMAT, StoredAdapters
from lightning_lora.tables import LayerName, grouped, layer_table


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


def inspect(stored: StoredAdapters) -> dict[str, Any]:
    """Return what a file holds, in plain types."""
    base = stored.base[0]
    with opened(stored.source) as file:
        size = file.seek(0, SEEK_END)
    return {
        "file": stored.source,
        "bytes": size,
        "format": FORMAT,
        "root": stored.root,
        "base": {"tensors": len(base["digests"]), "dtypes": base["dtypes"]},
        "config": stored.config.to_dict(),
        "layers": [_layer(stored, name) for name, layer in stored.layers.items() if not layer.tokens],
        "tokens": {name: list(layer.tokens) for name, layer in stored.layers.items() if layer.tokens},
        "beside": {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in besides(stored).items()
            if isinstance(value, torch.Tensor)
        },
    }


def _layer(stored: StoredAdapters, name: str) -> dict[str, Any]:
    """One layer: what it is, and the size of its update."""
    layer = stored.layers[name]
    values = [directions(update)[1] for update in matrix_updates(stored, name).values()]
    return {
        "name": name,
        "class": layer.layer_class,
        "parts": [matrix.name for matrix in layer.matrices if matrix.name],
        "r": layer.r,
        "scaling": layer.scaling,
        "shapes": {weight: list(shape) for weight, shape in layer.shapes.items()},
        "norm": sum(each.square().sum().item() for each in values) ** 0.5,
        "effective_rank": sum(effective_rank(each).mean().item() for each in values) / len(values),
    }


def _show(found: dict[str, Any]) -> None:
    console, layers = fitting_console(), {layer["name"]: layer for layer in found["layers"]}
    adapted = "1 adapted layer" if len(layers) == 1 else f"{len(layers)} adapted layers"
    title = f"{found['file']}: {decimal(found['bytes'])}, {adapted}"
    table = layer_table("Layers", "Type", "r", "scaling", "norm\nof ΔW", "effective\nrank", title=title)
    settings = ("class", "r", "scaling", "shapes")
    for group, names in grouped({name: str([layer[key] for key in settings]) for name, layer in layers.items()}):
        first, times = layers[names[0]], f" (×{len(names)})" if len(names) > 1 else ""
        numbers = list[str]()
        for key in ("norm", "effective_rank"):
            values = sorted(layers[name][key] for name in names)
            numbers.append("–".join(dict.fromkeys(map("{:.3g}".format, (values[0], values[-1])))))
        kind = LayerName(first["class"].rpartition(".")[2])
        table.add_row(LayerName(group + times), kind, str(first["r"]), f"{first['scaling']:g}", *numbers)
    console.print(table)
    if found["beside"]:
        beside = ", ".join(f"{name} {value['shape']}" for name, value in found["beside"].items())
        console.print(printable(f"Besides adapters: {beside}"), soft_wrap=True, markup=False)
    rows = "".join(map(" Rows of {} train: {}.".format, found["tokens"], map(len, found["tokens"].values())))
    base = found["base"]
    about = f"Base: {base['tensors']} frozen tensors, {', '.join(base['dtypes'])}.{rows}"
    console.print(printable(about), markup=False)
    usual = {**LoRAConfig().to_dict(), "r": None, "alpha": "", "target_modules": None}  # these are always shown
    given = [f"{key}={value!r}" for key, value in found["config"].items() if value != usual[key]]
    console.print(f"Arguments: {', '.join(given)}", soft_wrap=True, markup=False)

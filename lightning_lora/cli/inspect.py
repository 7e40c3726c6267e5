"""Show what a file of adapters holds.

For each group of layers: the rank, the scaling, the norm of the update, and how many of its directions count (effective
rank). Then what the file holds besides adapters, and the base they were trained on.

examples::

  lightning-lora inspect adapter.safetensors
  lightning-lora inspect last.ckpt --json | jq '.layers[0]'
"""

import json
import re
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from lightning_lora.cli.output import print_json
from lightning_lora.functional.subspace import effective_rank, singular_values
from lightning_lora.storage.offline.stored import StoredAdapters


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("file", type=str, help="a .safetensors or .ckpt file with adapters")
    parser.add_argument("--json", action="store_true", help="print one JSON object, with every layer")


def run(arguments: Any) -> None:
    """Read the file and print what it holds."""
    found = inspect(StoredAdapters(arguments.file))
    if arguments.json:
        print_json(found)
    else:
        _show(found)


def inspect(stored: StoredAdapters) -> dict[str, Any]:
    """Return what a file holds, in plain types."""
    base = stored.description["base"][0]
    beside = stored.beside()
    return {
        "file": str(stored.path),
        "bytes": stored.path.expanduser().stat().st_size,
        "format": stored.description["format"],
        "root": stored.description.get("root", ""),
        "base": {"tensors": len(base["digests"]), "dtypes": base["dtypes"]},
        "config": stored.config.to_dict(),
        "layers": [_layer(stored, name) for name in stored.layers],
        "beside": {
            name: {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in beside.items()
            if isinstance(value, torch.Tensor)
        },
    }


def _layer(stored: StoredAdapters, name: str) -> dict[str, Any]:
    """One layer: what it is, and the size of its update."""
    layer, norms, ranks = stored.layers[name], [], []
    scalings = {part.weight: part.scaling or layer.scaling for part in layer.parts}
    for weight, (a, b) in stored.factors(name).items():
        values = singular_values(a, b, scalings[weight])
        norms.append(values.norm().item())
        ranks.append(effective_rank(values).mean().item())
    return {
        "name": name,
        "class": layer.layer_class,
        "parts": [part.name for part in layer.parts if part.name],
        "r": layer.r,
        "scaling": layer.scaling,
        "norm": sum(norm**2 for norm in norms) ** 0.5,
        "effective_rank": sum(ranks) / len(ranks),
    }


def _show(found: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"{escape(found['file'])}: {decimal(found['bytes'])}, {len(found['layers'])} adapted layers")
    table.add_column("Layers", overflow="fold")
    table.add_column("Type")
    for heading in ("r", "scaling", "norm of ΔW", "effective rank"):
        table.add_column(heading, justify="right")
    for name, layers in _grouped(found["layers"]).items():
        times = f" (×{len(layers)})" if len(layers) > 1 else ""
        table.add_row(
            name + times,
            layers[0]["class"].rpartition(".")[2],
            str(layers[0]["r"]),
            f"{layers[0]['scaling']:g}",
            _range([layer["norm"] for layer in layers]),
            _range([layer["effective_rank"] for layer in layers]),
        )
    console.print(table)
    if found["beside"]:
        console.print(
            "Besides adapters: " + ", ".join(f"{n} {v['shape']}" for n, v in found["beside"].items()), markup=False
        )
    base, config = found["base"], {key: value for key, value in found["config"].items() if value not in (None, False)}
    console.print(
        f"Base: {base['tensors']} frozen tensors, {', '.join(base['dtypes'])}. Format {found['format']}.", markup=False
    )
    console.print("Configuration: " + json.dumps(config), soft_wrap=True, markup=False)


def _grouped(layers: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Layers whose names differ only by numbers, with the same settings."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for layer in layers:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer["name"])
        groups.setdefault((name, layer["class"], layer["r"], layer["scaling"]), []).append(layer)
    return {name: group for (name, *_), group in groups.items()}


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} – {high}"

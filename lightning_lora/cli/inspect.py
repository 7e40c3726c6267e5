"""Show what a file of adapters holds.

For each group of layers: the rank, the scaling, the norm of the update, and how many of its directions count (effective
rank). A weight that holds several projections, such as q, k and v, counts as one, so its effective rank can be above r.
Then what the file holds besides adapters, and the base they were trained on.

examples::

  lightning-lora inspect adapter.safetensors
  lightning-lora inspect last.ckpt --json | jq '.layers[0]'
"""

import json
from collections import Counter
from typing import Any

import torch
from rich.filesize import decimal
from rich.text import Text

from lightning_lora.cli.output import NARROW, layer_table, print_json
from lightning_lora.functional.subspace import effective_rank, singular_values
from lightning_lora.layer_names import spelled, template_of
from lightning_lora.storage.offline.stored import StoredAdapters
from lightning_lora.summary import fitting_console


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
    scalings = {part.weight: part.scaling or layer.scaling for part in layer.matrices}
    for weight, (a, b) in stored.factors(name).items():
        values = singular_values(a, b, scalings[weight])
        norms.append(values.norm().item())
        ranks.append(effective_rank(values).mean().item())
    return {
        "name": name,
        "class": layer.layer_class,
        "parts": [part.name for part in layer.matrices if part.name],
        "r": layer.r,
        "scaling": layer.scaling,
        "shapes": {weight: list(shape) for weight, shape in layer.shapes.items()},
        "norm": sum(norm**2 for norm in norms) ** 0.5,
        "effective_rank": sum(ranks) / len(ranks),
    }


def _show(found: dict[str, Any]) -> None:
    console = fitting_console()
    groups, narrow = _grouped(found["layers"]), console.width < NARROW
    names = [(name, f" (×{len(layers)})" if len(layers) > 1 else "") for name, layers in groups]
    firsts = [layers[0] for _, layers in groups]
    columns = {
        "Type": [Text(layer["class"].rpartition(".")[2]) for layer in firsts],
        "r": [Text(str(layer["r"])) for layer in firsts],
        "scaling": [Text(f"{layer['scaling']:g}") for layer in firsts],
        "norm\nof ΔW": _numbers(groups, "norm", narrow=narrow),
        "eff.\nrank" if narrow else "effective\nrank": _numbers(groups, "effective_rank", narrow=narrow),
    }
    if narrow:
        del columns["Type"], columns["scaling"]
    count = len(found["layers"])
    title = f"{found['file']}: {decimal(found['bytes'])}, {count} adapted {'layer' if count == 1 else 'layers'}"
    console.print(layer_table(title, names, columns, console.width))
    if found["beside"]:
        console.print(
            "Besides adapters: " + ", ".join(f"{n} {v['shape']}" for n, v in found["beside"].items()), markup=False
        )
    base, config = found["base"], {key: value for key, value in found["config"].items() if value not in (None, False)}
    console.print(
        f"Base: {base['tensors']} frozen tensors, {', '.join(base['dtypes'])}. Format {found['format']}.", markup=False
    )
    console.print("Configuration: " + json.dumps(config), soft_wrap=True, markup=False)


def _grouped(layers: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Layers whose names differ only by numbers, with the same settings and shapes, and the name of each group."""
    groups: dict[Any, list[dict[str, Any]]] = {}
    for layer in layers:
        template, _ = template_of(layer["name"])
        shapes = json.dumps(layer["shapes"])
        groups.setdefault((template, layer["class"], layer["r"], layer["scaling"], shapes), []).append(layer)
    alike = Counter(template for template, *_ in groups)
    named = []
    for (template, *_), group in groups.items():
        indices = [template_of(layer["name"])[1] for layer in group]
        named.append((spelled(template, indices, exactly=alike[template] > 1), group))
    return named


def _numbers(groups: list[tuple[str, list[dict[str, Any]]]], key: str, *, narrow: bool) -> list[Text]:
    """A number of each group: the mean, or the range if there is room."""
    values = [[layer[key] for layer in layers] for _, layers in groups]
    return [Text(f"{sum(each) / len(each):.3g}" if narrow else _range(each)) for each in values]


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}–{high}"

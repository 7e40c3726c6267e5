"""Compare the updates of several files, layer by layer.

The cosine is that of the angle between two updates: 1 means the same direction, 0 unrelated. The similarity is that of
the subspaces of A (what a layer reads) and of B (what it writes), from 0 to 1 (Hu et al. 2021, section 7.2). Random
factors of rank r in n dimensions have a similarity of about r / n.

examples::

  lightning-lora compare seed1.safetensors seed2.safetensors
  lightning-lora compare a.ckpt b.ckpt c.ckpt --json
"""

import json
from itertools import combinations
from typing import Any

from rich.text import Text

from lightning_lora.errors import AdapterFileError
from lightning_lora.functional.combine import Factors
from lightning_lora.functional.subspace import cosine, subspace_similarity
from lightning_lora.storage.offline.layers import read_layers, updates
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tables import fitting_console, layer_table, printable


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("files", nargs="+", help="two or more files with adapters")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: Any) -> None:
    """Read the files, compare each pair, and print the result."""
    if len(arguments.files) < 2:
        raise AdapterFileError("compare got one file. Expected at least two.")
    files = list(map(read_layers, arguments.files))
    found = [compare(one, other) for one, other in combinations(files, 2)]
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for pair in found:
            _show(pair)


def compare(one: StoredAdapters, other: StoredAdapters) -> dict[str, Any]:
    """Return the numbers of each layer that two files have in common."""
    layers = list[dict[str, Any]]()
    for name in one.layers:
        theirs = updates(other, name) if name in other.layers else {}
        for matrix, update in updates(one, name).items():
            if matrix in theirs:
                layers.append({"name": name, "part": matrix.name, **_numbers(update, theirs[matrix])})
    if not layers:
        raise AdapterFileError(
            f"{one.source} and {other.source} adapt no layer in common, such as {next(iter(one.layers))!r} and "
            f"{next(iter(other.layers))!r}. Compare files of the same model."
        )
    only = [[name for name in a.layers if name not in b.layers] for a, b in ((one, other), (other, one))]
    return {"files": [one.source, other.source], "layers": layers, "only_in": only}


def _numbers(first: Factors, second: Factors) -> dict[str, float]:
    (a1, b1), (a2, b2) = first, second
    return {
        "cosine": cosine(first, second).mean().item(),
        "similarity_A": subspace_similarity(a1, a2)[..., -1, -1].mean().item(),
        "similarity_B": subspace_similarity(b1.mT, b2.mT)[..., -1, -1].mean().item(),
    }


def _show(pair: dict[str, Any]) -> None:
    console = fitting_console()
    title = " and ".join(pair["files"])
    table = layer_table("Layers", "cosine\nof ΔW", "similarity\nof A", "of B", title=title)
    for layer in pair["layers"]:
        numbers = [f"{layer[key]:+.3f}" for key in ("cosine", "similarity_A", "similarity_B")]
        label = f"{layer['name']} [{layer['part']}]" if layer["part"] else layer["name"]
        table.add_row(Text(printable(label)), *numbers)
    console.print(table)
    for file, only in zip(pair["files"], pair["only_in"], strict=True):
        if only:
            console.print(printable(f"Only in {file}: {', '.join(only)}"), markup=False)

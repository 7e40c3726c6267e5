"""Compare the updates of several files, layer by layer.

The cosine is that of the angle between two updates: 1 means the same direction, 0 unrelated. The similarity is that of
the subspaces of A (what a layer reads) and of B (what it writes), from 0 to 1 (Hu et al. 2021, section 7.2). Random
factors of rank r in n dimensions have a similarity of about r / n.

examples::

  lightning-lora compare seed1.safetensors seed2.safetensors
  lightning-lora compare a.ckpt b.ckpt c.ckpt --picture cosines.png
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.text import Text
from torch import Tensor

from lightning_lora.cli.output import NARROW, layer_table, print_json
from lightning_lora.errors import AdapterFileError
from lightning_lora.functional.subspace import cosine, subspace_similarity
from lightning_lora.storage.offline.stored import StoredAdapters
from lightning_lora.summary import fitting_console
from lightning_lora.tensors.names import join


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("files", type=str, nargs="+", help="two or more files with adapters")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--picture", type=str, help="also draw the cosines into this .png file (needs matplotlib)")


def run(arguments: Any) -> None:
    """Read the files, compare each pair, and print the result."""
    if len(arguments.files) < 2:
        raise AdapterFileError("compare got one file. Expected at least two.")
    files = [StoredAdapters(file) for file in arguments.files]
    found = [compare(one, other) for one, other in combinations(files, 2)]
    if arguments.picture:
        _draw(found, Path(arguments.picture))
    if arguments.json:
        print_json(found)
    else:
        for pair in found:
            _show(pair)


def compare(one: StoredAdapters, other: StoredAdapters) -> dict[str, Any]:
    """Compare two files.

    Raises:
        AdapterFileError: they have no layer in common.
    """
    layers = [layer for name in one.layers if name in other.layers for layer in _layers(name, one, other)]
    if not layers:
        raise AdapterFileError(
            f"{one.path} and {other.path} adapt no layer in common, such as {next(iter(one.layers))!r} and "
            f"{next(iter(other.layers))!r}. Compare files of the same model."
        )
    only = [[name for name in a.layers if name not in b.layers] for a, b in ((one, other), (other, one))]
    return {"files": [str(one.path), str(other.path)], "layers": layers, "only_in": only}


def _layers(name: str, one: StoredAdapters, other: StoredAdapters) -> Iterator[dict[str, Any]]:
    """The numbers of one layer, for each of its weights."""
    first, second = one.factors(name), other.factors(name)
    for weight, (a, b) in first.items():
        if weight in second and _sides(a, b) == _sides(*second[weight]):
            yield {"name": name, "weight": weight, **_numbers((a, b), second[weight])}


def _sides(a: Tensor, b: Tensor) -> tuple[int, int]:
    return a.shape[-1], b.shape[-2]


def _numbers(first: Any, second: Any) -> dict[str, float]:
    (a1, b1), (a2, b2) = first, second
    return {
        "cosine": cosine(first, second).mean().item(),
        "similarity_A": subspace_similarity(a1, a2).mean().item(),
        "similarity_B": subspace_similarity(b1.mT, b2.mT).mean().item(),
    }


def _show(pair: dict[str, Any]) -> None:
    console, layers = fitting_console(), pair["layers"]
    names = [each["name"] if each["weight"] == "weight" else join(each["name"], each["weight"]) for each in layers]
    headings, digits = ("cosine\nof ΔW", "similarity\nof A", "of B"), 3
    if console.width < NARROW:
        headings, digits = ("cos.\nof ΔW", "sim.\nof A", "of B"), 2
    columns = {}
    for heading, key in zip(headings, ("cosine", "similarity_A", "similarity_B"), strict=True):
        columns[heading] = [_coloured(layer[key], digits) for layer in layers]
    title = " and ".join(pair["files"])
    console.print(layer_table(title, [(name, "") for name in names], columns, console.width))
    for file, only in zip(pair["files"], pair["only_in"], strict=True):
        if only:
            console.print(f"Only in {file}: {', '.join(only)}", markup=False)


def _coloured(value: float, digits: int) -> Text:
    """A number with a background that is the stronger, the nearer to 1 it is."""
    strength = round(min(abs(value), 1) * 160)
    return Text(
        f"{value:+.{digits}f}", style=f"on rgb({40},{40 + strength},{40 + strength // 2})" if strength > 8 else ""
    )


def _draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the cosines: a row for each layer, a column for each pair of files."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise AdapterFileError("--picture needs matplotlib. Install it: pip install matplotlib.") from error
    names = list(dict.fromkeys(layer["name"] for pair in found for layer in pair["layers"]))
    values = [[_cosine_of(pair, name) for pair in found] for name in names]
    figure, axes = plt.subplots(figsize=(3 + len(found), 1 + 0.25 * len(names)), layout="constrained")
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    labels = ["\n".join(Path(file).name for file in pair["files"]) for pair in found]
    axes.set_xticks(range(len(found)), labels, fontsize=7)
    figure.colorbar(image, label="cosine of the updates")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _cosine_of(pair: dict[str, Any], name: str) -> float:
    found = [layer["cosine"] for layer in pair["layers"] if layer["name"] == name]
    return sum(found) / len(found) if found else float("nan")

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

from torch import Tensor

from lightning_lora.cli.shown import (
    DescribedFile,
    DescribedLayer,
    DescribedTensor,
    show,
)
from lightning_lora.functional.subspace import directions, effective_rank
from lightning_lora.storage.checksum import FORMAT
from lightning_lora.storage.offline.without_model import (
    read_without_model,
    tensors_beside_adapters,
    updates_of_layer,
)
from lightning_lora.storage.on_disk.places import opened
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_modules import UNKNOWN_MODULE
from lightning_lora.tensors.dicts import of_type


def add_arguments(parser: Any) -> None:
    """Add the arguments of this command."""
    parser.add_argument("file", help="a .safetensors or .ckpt file with adapters")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object, with every layer"
    )


def run(arguments: Any) -> None:
    """Read the file and print what it holds."""
    found = describe(read_without_model(arguments.file))
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)


def describe(stored: StoredAdapters) -> DescribedFile:
    """Return what a file holds, in plain types."""
    # a file of this package names its base, once for each dtype: the first one tells
    base = stored.base[0]
    layers: list[DescribedLayer] = []
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
        "base": {
            "tensors": len(base["digests"]),
            "dtypes": base["dtypes"],
            "name": _name_of_base(stored),
        },
        "config": stored.config.to_dict(),
        "layers": layers,
        "tokens": rows,
        "beside": _describe_others(stored),
        "metrics": stored.metrics,
    }


def _name_of_base(stored: StoredAdapters) -> str:
    """The repository or folder that the one model inside came from.

    Empty: the file does not say it.
    """
    return stored.modules.get(stored.root, UNKNOWN_MODULE).pretrained


def _size_of(source: str) -> int:
    """The bytes of a file, or of what a URL names."""
    with opened(source) as file:
        size: int = file.seek(0, SEEK_END)
    return size


def _describe_layer(stored: StoredAdapters, name: str) -> DescribedLayer:
    """One layer: what it is, and the size of its update."""
    layer = stored.layers[name]
    updates = updates_of_layer(stored, name)
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


def _describe_others(stored: StoredAdapters) -> dict[str, DescribedTensor]:
    """The shape and dtype of each tensor that is no adapter's."""
    described: dict[str, DescribedTensor] = {}
    for name, tensor in of_type(tensors_beside_adapters(stored), Tensor).items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        described[name] = {"shape": list(tensor.shape), "dtype": dtype}
    return described

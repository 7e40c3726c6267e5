"""Combine several files of adapters into one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, ConfigError, listed
from lightning_lora.functional.combine import Factors, concatenated, dare, factored, ties, truncated
from lightning_lora.storage.formats.own import check_place, write_adapter_file
from lightning_lora.storage.names import by_whole_names, targets_of
from lightning_lora.storage.offline.stored import StoredAdapters
from lightning_lora.storage.stored import StoredAdapters as Combined
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join

Method = Literal["cat", "svd", "ties", "dare"]


@dataclass(frozen=True)
class How:
    """How files are combined.

    Args:
        method: ``"cat"``: the exact sum, of rank Σr. ``"svd"``: its best approximation with rank r. ``"ties"`` and
            ``"dare"``: sums of a share of the values, approximated with rank r.
        weights: The weight of each file.
        r: The rank of the result, for all methods but ``"cat"``. None: the largest rank of the files.
        density: The share of the values that ``"ties"`` and ``"dare"`` keep.
        seed: For ``"dare"``, which draws the values.
    """

    method: Method
    weights: tuple[float, ...]
    r: int | None = None
    density: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.r is not None and (self.r < 1 or self.method == "cat"):
            raise ConfigError(
                f"rank={self.r} is not valid with {self.method!r}. Use it with svd, ties or dare, from 1."
            )
        if not all(map(math.isfinite, self.weights)):
            raise ConfigError(f"weights={list(self.weights)} are not valid. Expected finite numbers.")
        if not 0 < self.density <= 1:
            raise ConfigError(f"density={self.density} is not valid. Expected a share above 0, of at most 1.")


def combine_files(paths: Sequence[Path], out: Path, how: How) -> int:
    r"""Combine files of adapters into one file.

    The result is :math:`\sum_i w_i \, \Delta W_i`, or what ``how`` makes of it. A layer that a file does not adapt
    counts as an update of zero.

    Args:
        paths: Two or more files of the same base.
        out: The new file. Its name ends in ``.safetensors``.
        how: The method and its numbers.

    Returns:
        The number of layers.

    Raises:
        ConfigError: there is not one weight for each file.
        AdapterFileError: a file cannot be read or written.
        BaseMismatchError: the files are of different bases.
        AdapterMismatchError: updates cannot be added: DoRA, modules trained in full, or other parts of a layer.
    """
    check_place(out)
    if len(paths) < 2 or len(how.weights) != len(paths):
        raise ConfigError(f"Got {len(paths)} files and {len(how.weights)} weights. Expected at least two, and as many.")
    files = [StoredAdapters(path) for path in paths]
    _check_alike(files)
    generator = torch.Generator().manual_seed(how.seed)
    layers, state = list[StoredLayer](), dict[str, Tensor]()
    with torch.no_grad():
        for name in dict.fromkeys(name for file in files for name in file.layers):
            combined = _combined(files, name, how, generator)
            layers.append(_layer(next(file.layers[name] for file in files if name in file.layers), combined))
            for part in layers[-1].matrices:
                for factor, value in part.named(combined[part.name]).items():
                    state[join(name, factor)] = value
    write_adapter_file(out, _described(files[0], layers, state))
    return len(layers)


def _check_alike(files: list[StoredAdapters]) -> None:
    """Refuse files whose updates cannot be added."""
    first = files[0]
    for file in files:
        broken = [
            name for name, value in file.state.items() if isinstance(value, Tensor) and not value.isfinite().all()
        ]
        if broken:
            raise AdapterFileError(f"{listed(broken)} in {file.path} hold NaN or infinite values: use an earlier file.")
        if file.config.use_dora:
            raise AdapterMismatchError(f"{file.path} uses DoRA: its updates depend on the base and cannot be added.")
        if beside := file.beside():
            raise AdapterMismatchError(
                f"{file.path} also holds {listed(beside)}, trained in full: they cannot be combined. Train without "
                "modules_to_save and bias, or merge one of the files first."
            )
        if not _is_same_base(first, file) or file.description.get("root") != first.description.get("root"):
            raise BaseMismatchError(f"{first.path} and {file.path} were trained on different bases. Use one base.")
    for file in files:
        for name, layer in file.layers.items():
            for other in files:
                found = other.layers.get(name, layer)
                if _form(found) != _form(layer):
                    raise AdapterMismatchError(
                        f"{name!r} is adapted in other parts in {file.path} than in {other.path}. Use the same "
                        "target_slices and target_parameters."
                    )


def _is_same_base(one: StoredAdapters, other: StoredAdapters) -> bool:
    """Whether two files have a form of the base in common."""
    return any(form in other.description["base"] for form in one.description["base"])


def _form(layer: StoredLayer) -> Any:
    return layer.kind, layer.shapes, [(part.name, part.weight, part.first, part.writes) for part in layer.matrices]


def _combined(files: list[StoredAdapters], name: str, how: How, generator: torch.Generator) -> dict[str, Factors]:
    """Combine one layer's updates, by the name of the part."""
    holding = [
        (file.parts(name), weight) for file, weight in zip(files, how.weights, strict=True) if name in file.layers
    ]
    result = {}
    for part in holding[0][0]:
        updates, weights = [parts[part] for parts, _ in holding], [weight for _, weight in holding]
        r = how.r or max(a.shape[-2] for a, _ in updates)
        if how.method in ("cat", "svd"):
            a, b = concatenated(updates, weights)
            most = min(a.shape[-1], b.shape[-2])
            wanted = most if how.method == "cat" else min(r, most)
            result[part] = (a, b) if a.shape[-2] <= wanted else truncated((a, b), wanted)
            continue
        deltas = [b @ a for a, b in updates]
        delta = (
            ties(deltas, weights, how.density)
            if how.method == "ties"
            else dare(deltas, weights, how.density, generator)
        )
        result[part] = factored(delta, min(r, *delta.shape[-2:]))
    return {part: (a.contiguous(), b.contiguous()) for part, (a, b) in _of_one_rank(result).items()}


def _of_one_rank(result: dict[str, Factors]) -> dict[str, Factors]:
    """Pad the factors of a layer's parts with zeros to the rank that each has in a layer of the largest rank."""
    largest = max(a.shape[-2] for a, _ in result.values())
    padded = {}
    for part, (a, b) in result.items():
        more = min(largest, a.shape[-1], b.shape[-2]) - a.shape[-2]
        padded[part] = (
            torch.nn.functional.pad(a, (0, 0, 0, more)),
            torch.nn.functional.pad(b, (0, more)),
        )
    return padded


def _layer(like: StoredLayer, combined: dict[str, Factors]) -> StoredLayer:
    """Describe a layer of the new file: its scaling is one."""
    r = max(a.shape[-2] for a, _ in combined.values())
    parts = tuple(replace(part, r=None, scaling=None) for part in like.matrices)
    return replace(like, r=r, scaling=1.0, matrices=parts)


def _described(like: StoredAdapters, layers: list[StoredLayer], state: dict[str, Tensor]) -> Combined:
    """Describe the new file, with each layer named in full."""
    ranks = {target: (layer.r, layer.r) for layer in layers for target in targets_of(layer)}
    names = [name for form in like.description["base"] for name in form.get("rounded", ())]
    present = {name.rpartition(".")[0] for name in names} | {layer.name for layer in layers}
    return Combined(
        config=by_whole_names(layers, ranks, LoRAConfig(), present),
        state=state,
        layers={layer.name: layer for layer in layers},
        base=like.description["base"],
        root=like.description["root"],
    )

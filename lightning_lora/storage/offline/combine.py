"""Combine several files of adapters into one."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, ConfigError, listed
from lightning_lora.functional.combine import Factors, concatenated, dare, factored, ties, truncated, with_rank
from lightning_lora.layers import AdaptedMatrix
from lightning_lora.storage.formats.own import check_place, write_adapter_file
from lightning_lora.storage.names import by_whole_names
from lightning_lora.storage.offline.layers import besides, read_layers, updates
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, bare
from lightning_lora.tensors.names import join

Method = Literal["cat", "svd", "ties", "dare"]


@dataclass(frozen=True)
class How:
    """How files are combined: the method, the weight of each file, and the numbers of the methods."""

    method: Method  # the exact sum, of rank Σr; its best approximation with rank r; or of a share of the values
    weights: tuple[float, ...]
    r: int | None = None  # the rank of the result, but for "cat"; None: the largest rank of the files
    density: float = 0.2  # the share of the values that "ties" and "dare" keep
    seed: int = 0  # for "dare", which draws the values

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
    """Write the sum of all updates, or what ``how`` makes of it. Return the number of layers."""
    check_place(out, paths)
    if len(paths) < 2 or len(how.weights) != len(paths):
        found = f"Got {len(paths)} files and {len(how.weights)} weights"
        raise ConfigError(f"{found}. Expected at least two files, and one weight for each.")
    files = list(map(read_layers, paths))
    _check_bases(files)
    stored = combined(files, how)
    write_adapter_file(out, stored)
    return len(stored.layers)


@torch.no_grad()
def combined(files: Sequence[StoredAdapters], how: How) -> StoredAdapters:
    """Return the sum of all updates on one base, or what ``how`` makes of it."""
    first, generator = files[0], torch.Generator().manual_seed(how.seed)
    layers, state = dict[str, StoredLayer](), {name: first.state[name] for name in first.filled}
    for name, layer in _check_alike(files).items():
        held = defaultdict[AdaptedMatrix, list[tuple[Factors, float]]](list)
        for file, weight in zip(files, how.weights, strict=True):
            for matrix, update in updates(file, name).items() if name in file.layers else ():  # or it is zero
                held[matrix].append((update, weight))
        found = {matrix: _combined(matrix, each, how, generator) for matrix, each in held.items()}
        r = max(a.shape[-2] for a, _ in found.values())
        layers[name] = replace(layer, r=r)
        for matrix, update in found.items():
            factors = matrix.named(with_rank(update, matrix.rank(r)))
            state |= {join(name, parameter): factor.contiguous() for parameter, factor in factors.items()}
    config = _config(list(layers.values()), first.base)
    return StoredAdapters(config, state, layers, first.base, random=first.filled, root=first.root)


def _check_bases(files: Sequence[StoredAdapters]) -> None:
    """Refuse files of several bases."""
    first = files[0]
    for file in files:
        is_same = file.filled == first.filled and all(torch.equal(file.state[n], first.state[n]) for n in file.filled)
        if not any(form in file.base for form in first.base) or file.root != first.root or not is_same:
            raise BaseMismatchError(f"{first.source} and {file.source} were trained on different bases. Use one base.")


def _check_alike(files: Sequence[StoredAdapters]) -> dict[str, StoredLayer]:
    """Refuse adapters whose updates cannot be added. Return the layers of all, each with a scaling of one."""
    layers, holder = dict[str, StoredLayer](), dict[str, StoredAdapters]()
    for file in files:
        if file.config.use_dora:
            raise AdapterMismatchError(f"{file.source} uses DoRA: its updates depend on the base and cannot be added.")
        if beside := besides(file):
            raise AdapterMismatchError(
                f"{file.source} also holds {listed(beside)}, which cannot be combined: they were trained in full, or "
                "looked untrained. Train without modules_to_save and bias, from one base, or merge one file first."
            )
        for name, layer in file.layers.items():
            if layer.tokens:
                raise AdapterMismatchError(f"{file.source} trains single rows of {name!r}, which cannot be added up.")
            matrices = tuple(map(bare, layer.matrices))
            found = layers.setdefault(name, replace(layer, scaling=1.0, matrices=matrices))
            other = holder.setdefault(name, file)
            if (found.kind, found.shapes, found.matrices) != (layer.kind, layer.shapes, matrices):
                raise AdapterMismatchError(
                    f"{name!r} is adapted in other parts in {other.source} than in {file.source}. Use the same "
                    "target_slices and target_parameters."
                )
    return layers


def _combined(
    matrix: AdaptedMatrix, weighted: list[tuple[Factors, float]], how: How, generator: torch.Generator
) -> Factors:
    """Combine the updates of one matrix, each with its weight."""
    found, weights = map(list, zip(*weighted, strict=True))
    r = matrix.rank(how.r or max(a.shape[-2] for a, _ in found))
    if how.method in ("ties", "dare"):
        given = [b @ a for a, b in found], weights, how.density
        return factored(ties(*given) if how.method == "ties" else dare(*given, generator), r)
    update = concatenated(found, weights)
    most = matrix.largest_rank if how.method == "cat" else r
    return update if update[0].shape[-2] <= most else truncated(update, most)


def _config(layers: list[StoredLayer], base: list[dict[str, Any]]) -> LoRAConfig:
    """A configuration that names each layer in full."""
    names = [name for form in base for name in form.get("rounded", ())]
    present = {name.rpartition(".")[0] for name in names} | {layer.name for layer in layers}
    return by_whole_names(layers, LoRAConfig(), present)

"""Combine several files of adapters into one."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, ConfigError, listed
from lightning_lora.functional.factors import Factors, concatenated, truncated, with_rank
from lightning_lora.layers import AdaptedMatrix
from lightning_lora.storage.formats.own import check_place, write_adapter_file
from lightning_lora.storage.offline.layers import besides, matrix_updates, read_layers
from lightning_lora.storage.renaming import by_whole_names
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, bare
from lightning_lora.tensors.names import join, owner_of


def combine_files(paths: Sequence[str | Path], out: str | Path, weights: Sequence[float], r: int | None = None) -> int:
    """Write the weighted sum of all updates, or its best approximation of rank r. Return the number of layers."""
    check_place(out, paths)
    if not 2 <= len(paths) == len(weights):
        raise ConfigError(f"Got {len(paths)} files, {len(weights)} weights. Expected at least two, a weight for each.")
    files = list(map(read_layers, paths))
    stored = combined(files, weights, r)
    _check_bases(files)
    write_adapter_file(out, stored)
    return len(stored.layers)


@torch.no_grad()
def combined(
    files: Sequence[StoredAdapters], weights: Sequence[float], r: int | None, known: Iterable[str] = ()
) -> StoredAdapters:
    """Return the weighted sum of all updates on one base. It is exact with the ranks added up, or cut to rank r."""
    if not all(map(math.isfinite, weights)) or (r is not None and not (isinstance(r, int) and r > 0)):
        raise ConfigError(f"weights={list(weights)}, rank={r}: expected finite numbers, and a rank of at least 1.")
    first = files[0]
    layers, state = dict[str, StoredLayer](), {name: first.state[name] for name in first.filled}
    for name, layer in _check_alike(files).items():
        held = defaultdict[AdaptedMatrix, list[tuple[Factors, float]]](list)
        for file, weight in zip(files, weights, strict=True):
            for matrix, update in matrix_updates(file, name).items() if name in file.layers else ():  # or it is zero
                held[matrix].append((update, weight))
        found = {matrix: _combined(matrix, each, r) for matrix, each in held.items()}
        most = max(a.shape[-2] for a, _ in found.values())
        layers[name] = replace(layer, r=most)
        for matrix, update in found.items():
            factors = matrix.named(with_rank(update, matrix.rank(most)))
            state |= {join(name, parameter): factor.contiguous() for parameter, factor in factors.items()}
    present = {*layers, *known, *(owner_of(name) for each in first.base for name in each.get("rounded", ()))}
    config = by_whole_names(layers.values(), LoRAConfig(), present)
    return StoredAdapters(config, state, layers, first.base, random=first.filled, root=first.root)


def _check_bases(files: Sequence[StoredAdapters]) -> None:
    """Refuse files of several bases."""
    first = files[0]
    for file in files:
        is_same = file.filled == first.filled and all(torch.equal(file.state[n], first.state[n]) for n in file.filled)
        if not any(each in file.base for each in first.base) or file.root != first.root or not is_same:
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
                    f"{name!r} is adapted in other parts in {other.source} than in {file.source}. Use one base, "
                    "and the same target_slices and target_parameters."
                )
    return layers


def _combined(matrix: AdaptedMatrix, weighted: list[tuple[Factors, float]], r: int | None) -> Factors:
    """The weighted sum of updates of one matrix."""
    update = concatenated(*map(list, zip(*weighted, strict=True)))
    most = matrix.largest_rank if r is None else matrix.rank(r)
    return update if update[0].shape[-2] <= most else truncated(update, most)

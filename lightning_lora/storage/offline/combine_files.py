"""Combine several files of adapters into one."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from lightning_lora.base.fingerprints import names_in
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, ConfigError, listed
from lightning_lora.functional.factors import Factors, concatenated, truncated, with_rank
from lightning_lora.layers import AdaptedMatrix
from lightning_lora.storage.formats.own import check_place, write_adapter_file
from lightning_lora.storage.inner_model import StoredModule
from lightning_lora.storage.offline.layers import besides, matrix_updates, read_layers
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, bare
from lightning_lora.storage.whole_names import by_whole_names
from lightning_lora.tensors.dicts import only, prefixed
from lightning_lora.tensors.names import owner_of

_Path = str | Path
_Files = Sequence[StoredAdapters]
_Weights = Sequence[float]  # one for each file
_Updates = dict[AdaptedMatrix, Factors]  # of one layer


def combine_files(paths: Sequence[_Path], out: _Path, weights: _Weights, r: int | None = None) -> int:
    """Write the weighted sum of all updates, or its best approximation of rank r. Return the number of layers."""
    check_place(out, paths)
    if len(paths) < 2 or len(weights) != len(paths):
        raise ConfigError(f"Got {len(paths)} files, {len(weights)} weights. Expected at least two, a weight for each.")
    files = [read_layers(path) for path in paths]
    stored = combined(files, weights, r)
    _check_bases(files)
    write_adapter_file(out, stored)
    return len(stored.layers)


@torch.no_grad()
def combined(files: _Files, weights: _Weights, r: int | None, module_names: Iterable[str] = ()) -> StoredAdapters:
    """Return the weighted sum of all updates on one base. It is exact with the ranks added up, or cut to rank r.

    Args:
        files: The adapters.
        weights: One for each of them.
        r: The rank of each sum. None: as high as its updates' ranks together.
        module_names: All modules of the model, as far as they are known: the configuration means none of the others.
    """
    _check_numbers(weights, r)
    first = files[0]
    layers = dict[str, StoredLayer]()
    state = only(first.state, first.filled_in_state)
    for name, layer in _layers_of_all(files).items():
        updates = _summed_updates(files, weights, name, r)
        highest_rank = max(map(_rank_of_update, updates.values()))
        layers[name] = replace(layer, r=highest_rank)
        state.update(_named_factors(name, updates, highest_rank))
    modules = _modules_of_all(files)
    present = {*layers, *module_names, *modules, *_owners_in_base(first)}
    config = by_whole_names(layers.values(), LoRAConfig(), present)
    return StoredAdapters(
        config, state, layers, first.base, filled=first.filled_in_state, root=first.root, modules=modules
    )


def _modules_of_all(files: _Files) -> dict[str, StoredModule]:
    """What files say of modules, the first one above all. Nothing, if one of 0.2.0 among them does not."""
    modules = dict[str, StoredModule]()
    for file in files:
        if not file.modules:
            return {}
        modules = {**file.modules, **modules}
    return modules


# Sums of updates


@dataclass
class _WeightedSum:
    """The updates of one matrix, and their weights."""

    updates: list[Factors] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, update: Factors, weight: float) -> None:
        """Add the update in one more file."""
        self.updates.append(update)
        self.weights.append(weight)

    def factors(self, matrix: AdaptedMatrix, r: int | None) -> Factors:
        """Return A and B of the sum: exact, if the rank r (or the largest of the matrix) suffices for it."""
        update = concatenated(self.updates, self.weights)
        highest_rank = matrix.largest_rank if r is None else matrix.rank(r)
        if _rank_of_update(update) <= highest_rank:
            return update
        return truncated(update, highest_rank)


def _summed_updates(files: _Files, weights: _Weights, name: str, r: int | None) -> _Updates:
    """The sum for each matrix of a layer. The update is zero in files that do not adapt it."""
    sums = defaultdict[AdaptedMatrix, _WeightedSum](_WeightedSum)
    for file, weight in zip(files, weights, strict=True):
        for matrix, update in matrix_updates(file, name).items():
            sums[matrix].add(update, weight)
    return {matrix: weighted_sum.factors(matrix, r) for matrix, weighted_sum in sums.items()}


def _named_factors(name: str, updates: _Updates, r: int) -> dict[str, Tensor]:
    """A and B of a layer by their names in a file: all with rank r, or with the largest of their matrix."""
    named = dict[str, Tensor]()
    for matrix, update in updates.items():
        a, b = with_rank(update, matrix.rank(r))
        named |= matrix.named((a.contiguous(), b.contiguous()))
    return prefixed(name, named)


def _rank_of_update(update: Factors) -> int:
    a, _ = update
    return a.shape[-2]


def _owners_in_base(stored: StoredAdapters) -> set[str]:
    """The modules that hold the tensors of a base."""
    owners = set[str]()
    for fingerprint in stored.base:
        owners.update(map(owner_of, names_in(fingerprint)))
    return owners


# Checks


def _check_numbers(weights: _Weights, r: int | None) -> None:
    """Refuse weights and a rank with which no sum can be computed."""
    are_finite = all(map(math.isfinite, weights))
    is_rank = r is None or (isinstance(r, int) and r > 0)
    if not (are_finite and is_rank):
        raise ConfigError(f"weights={list(weights)}, rank={r}: expected finite numbers, and a rank of at least 1.")


def _check_bases(files: _Files) -> None:
    """Refuse files of several bases."""
    first = files[0]
    for file in files:
        if not _have_one_base(first, file):
            raise BaseMismatchError(f"{first.source} and {file.source} were trained on different bases. Use one base.")


def _have_one_base(one: StoredAdapters, other: StoredAdapters) -> bool:
    """Whether two files are of the same model, and of the same base in one dtype at least."""
    if (one.root, one.filled_in_state) != (other.root, other.filled_in_state):
        return False
    have_one_fingerprint = any(fingerprint in other.base for fingerprint in one.base)
    if not have_one_fingerprint:
        return False
    return all(torch.equal(one.state[name], other.state[name]) for name in one.filled_in_state)


def _layers_of_all(files: _Files) -> dict[str, StoredLayer]:
    """The layers of all files, each with a scaling of one. Updates that cannot be added are refused."""
    layers = dict[str, StoredLayer]()
    first_source = dict[str, str]()  # the first file that adapts a layer
    for file in files:
        _check_can_be_added(file)
        for name, layer in file.layers.items():
            comparable = _comparable(layer, file.source)
            first = layers.setdefault(name, comparable)
            source = first_source.setdefault(name, file.source)
            if not _have_same_parts(first, comparable):
                raise AdapterMismatchError(
                    f"{name!r} is adapted in other parts in {source} than in {file.source}. Use one base, "
                    "and the same target_slices and target_parameters."
                )
    return layers


def _check_can_be_added(file: StoredAdapters) -> None:
    """Refuse a file that holds more than updates of weights."""
    if file.config.use_dora:
        raise AdapterMismatchError(f"{file.source} uses DoRA: its updates depend on the base and cannot be added.")
    others = besides(file)
    if others:
        raise AdapterMismatchError(
            f"{file.source} also holds {listed(others)}, which cannot be combined: they were trained in full, or "
            "looked untrained. Train without modules_to_save and bias, from one base, or merge one file first."
        )


def _comparable(layer: StoredLayer, source: str) -> StoredLayer:
    """A layer without its ranks and scalings, in which files may differ. Single rows are refused."""
    if layer.tokens:
        raise AdapterMismatchError(f"{source} trains single rows of {layer.name!r}, which cannot be added up.")
    matrices = tuple(map(bare, layer.matrices))
    return replace(layer, scaling=1.0, matrices=matrices)


def _have_same_parts(one: StoredLayer, other: StoredLayer) -> bool:
    """Whether the same parts of the same weights are adapted, in the same way."""
    return (one.kind, one.shapes, one.matrices) == (other.kind, other.shapes, other.matrices)

"""Sum the updates of several files of adapters, or of several adapters of a model."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from lightning_lora.base.fingerprints import names_in
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, ConfigError, listed
from lightning_lora.functional.factors import Factors, concatenated, truncated
from lightning_lora.layers import AdaptedMatrix
from lightning_lora.storage.formats.layer_updates import LayerUpdate
from lightning_lora.storage.offline.without_model import (
    tensors_beside_adapters,
    updates_of_layer,
)
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer, bare
from lightning_lora.storage.stored_modules import StoredModule
from lightning_lora.storage.whole_names import by_whole_names
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.names import owner_of

Summands = Sequence[StoredAdapters]
Weights = Sequence[float]  # the numbers by which their updates are multiplied


@torch.no_grad()
def weighted_sum(
    summands: Summands,
    weights: Weights,
    r: int | None,
    module_names: Iterable[str] = (),
) -> StoredAdapters:
    """Return the weighted sum of all updates on one base.

    It is exact, with the ranks added up, or the best approximation of rank r. Buffers
    that a run filled are no update: the sum has those of the first summand.

    Args:
        summands: The adapters, of several files or of one model.
        weights: One for each of them.
        r: The rank of each sum. None: as high as its updates' ranks together.
        module_names: The modules of the model, as far as they are known. The
            configuration must mean none that is not adapted.
    """
    _check_numbers(weights, r)
    first = summands[0]
    layers = dict[str, StoredLayer]()
    state = only(first.state, first.filled_in_state)
    for name, layer in _checked_layers(summands).items():
        update = _summed_update(summands, weights, layer, r)
        layers[name] = replace(layer, r=update.r)
        state |= update.tensors()
    modules = _modules_of_all(summands)
    known_modules = {*layers, *module_names, *modules, *_owners_in_base(first)}
    config = by_whole_names(layers.values(), LoRAConfig(), known_modules)
    return StoredAdapters(
        config,
        state,
        layers,
        first.base,
        of_no_base=first.filled_in_state,
        root=first.root,
        modules=modules,
    )


def _modules_of_all(summands: Summands) -> dict[str, StoredModule]:
    """What is known of modules. Of one that several summands know, the first says it.

    Nothing is known, if a file of 0.2.0 is among them.
    """
    modules = dict[str, StoredModule]()
    for stored in summands:
        if not stored.modules:
            return {}
        modules = {**stored.modules, **modules}
    return modules


# Sums of updates


def _summed_update(
    summands: Summands, weights: Weights, layer: StoredLayer, r: int | None
) -> LayerUpdate:
    """The sum of the updates of a layer. A summand that does not adapt the layer adds nothing."""
    updates = list[Mapping[AdaptedMatrix, Factors]]()
    weights_of_updates = list[float]()
    for stored, weight in zip(summands, weights, strict=True):
        if layer.name in stored.layers:
            updates.append(updates_of_layer(stored, layer.name))
            weights_of_updates.append(weight)
    sums = list[Factors]()
    for matrix in layer.matrices:
        of_matrix = [factors[matrix] for factors in updates]
        exact = concatenated(of_matrix, weights_of_updates)
        sums.append(_with_allowed_rank(exact, matrix, r))
    return LayerUpdate(layer, tuple(sums))


def _with_allowed_rank(
    update: Factors, matrix: AdaptedMatrix, r: int | None
) -> Factors:
    """The update, or its best approximation, if its rank is above r.

    None: it may have the largest rank that the matrix can have.
    """
    allowed = matrix.largest_rank if r is None else matrix.rank_for(r)
    a, _ = update
    rank = a.shape[-2]
    return update if rank <= allowed else truncated(update, allowed)


def _owners_in_base(stored: StoredAdapters) -> set[str]:
    """The modules that hold the tensors of a base."""
    owners = set[str]()
    for fingerprint in stored.base:
        owners.update(map(owner_of, names_in(fingerprint)))
    return owners


# Checks


def _check_numbers(weights: Weights, r: int | None) -> None:
    """Refuse weights and a rank with which no sum can be computed."""
    are_finite = all(map(math.isfinite, weights))
    is_rank = r is None or (isinstance(r, int) and r > 0)
    if not (are_finite and is_rank):
        raise ConfigError(
            f"weights={list(weights)}, rank={r}: expected finite numbers, and a rank "
            "of at least 1."
        )


def _checked_layers(summands: Summands) -> dict[str, StoredLayer]:
    """The layers of all summands, each with a scaling of one: its own is in B.

    Updates that cannot be added are refused.
    """
    layers = dict[str, StoredLayer]()
    source_of = dict[str, str]()  # the first summand that adapts each layer
    for stored in summands:
        _check_can_be_added(stored)
        for name, layer in stored.layers.items():
            _refuse_single_rows(layer, stored.source)
            layer = _without_own_numbers(layer)
            if name not in layers:
                layers[name] = layer
                source_of[name] = stored.source
            elif not _have_same_parts(layers[name], layer):
                raise AdapterMismatchError(
                    f"{name!r} is adapted in other parts in {source_of[name]} than in "
                    f"{stored.source}. Use one base, and the same target_slices and "
                    "target_parameters."
                )
    return layers


def _check_can_be_added(stored: StoredAdapters) -> None:
    """Refuse DoRA, and what holds more than updates of weights."""
    if stored.config.use_dora:
        raise AdapterMismatchError(
            f"{stored.source} uses DoRA: its updates depend on the base and cannot be "
            "added."
        )
    others = tensors_beside_adapters(stored)
    if others:
        raise AdapterMismatchError(
            f"{stored.source} also holds {listed(others)}, which cannot be combined: "
            "they were trained in full, or looked untrained. Train without "
            "modules_to_save and bias, from one base, or merge one file first."
        )


def _refuse_single_rows(layer: StoredLayer, source: str) -> None:
    """Refuse an embedding of which single rows train."""
    if layer.tokens:
        raise AdapterMismatchError(
            f"{source} trains single rows of {layer.name!r}, which cannot be added up."
        )


def _without_own_numbers(layer: StoredLayer) -> StoredLayer:
    """A layer without the numbers in which summands may differ: its scaling, and those of its matrices' own."""
    matrices = tuple(map(bare, layer.matrices))
    return replace(layer, scaling=1.0, matrices=matrices)


def _have_same_parts(one: StoredLayer, other: StoredLayer) -> bool:
    """Whether the same parts of the same weights are adapted, by the same kind of adapter."""
    return (one.kind, one.shapes, one.matrices) == (
        other.kind,
        other.shapes,
        other.matrices,
    )

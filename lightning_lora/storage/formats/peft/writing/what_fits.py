"""Adapters as PEFT can hold them: without layers that no batch has reached, and with tied modules saved twice."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from itertools import chain

from torch import Tensor, nn

from lightning_lora.errors import listed, warn
from lightning_lora.layers import INITIALISATIONS
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.refusals.all_refusals import (
    refuse_what_peft_cannot_hold,
)
from lightning_lora.storage.formats.peft.refusals.refused_layers import refused_layers
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import only, without
from lightning_lora.tensors.names import direct_parameters, join, names_joined, owner_of


def with_what_peft_can_hold(export: Export) -> Export:
    """Return the adapters that PEFT can hold. Refuse the others."""
    export = _without_zeros(export)
    export = _with_tied_modules(export)
    refuse_what_peft_cannot_hold(export)
    return export


# Layers that no batch has reached


def _without_zeros(export: Export) -> Export:
    """Leave out layers that PEFT cannot hold, if their update is zero: no batch has reached them.

    If all are zero, none is left out: nothing would remain. What is left in is asked for
    its refusals once more, by :func:`refuse_what_peft_cannot_hold`.
    """
    stored = export.stored
    # with these, an update may be something else than zero if B is zero
    if stored.config.use_dora or INITIALISATIONS[stored.config.init].is_difference:
        return export
    zeros = list[str]()
    for name in chain.from_iterable(refused_layers(export).values()):
        if _has_zero_update(stored.layers[name], stored.state):
            zeros.append(name)
    if not zeros or len(zeros) == len(stored.layers):
        return export
    warn(
        f"{listed(zeros)} have updates of zero, and PEFT cannot hold them: they are "
        "left out."
    )
    return replace(export, stored=_without_layers(stored, zeros))


def _has_zero_update(layer: StoredLayer, state: Mapping[str, Tensor]) -> bool:
    """Whether each B of a layer is zero."""
    if layer.tokens:  # single rows have no B
        return False
    for matrix in layer.matrices:
        b = state[join(layer.name, matrix.parameter_name(Role.B))]
        if b.any():
            return False
    return True


def _without_layers(stored: StoredAdapters, names: Collection[str]) -> StoredAdapters:
    """The adapters without those of some layers."""
    left_out = replace(stored, layers=only(stored.layers, names))
    return replace(
        stored,
        layers=without(stored.layers, names),
        state=without(stored.state, left_out.adapter_names()),
    )


# Modules with one weight


def _with_tied_modules(export: Export) -> Export:
    """Save a module whole too, if it has a weight of a module that is saved whole.

    An embedding and its head have one weight, and ``modules_to_save`` names the
    embedding. Here both train. PEFT would train a copy for the embedding alone, so the
    head is saved too.
    """
    stored = export.stored
    saved_modules = _modules_with(chain.from_iterable(stored.saved.values()), export)
    saved_weights = set(direct_parameters(saved_modules).values())
    saved = dict(stored.saved)
    trained_in_full = without(_modules_with(stored.state, export), stored.layers)
    for name, module in trained_in_full.items():
        is_tied = not saved_weights.isdisjoint(module.parameters(recurse=False))
        if is_tied and module not in saved_modules.values():
            saved[name] = names_joined(name, module.state_dict())
    return replace(export, stored=replace(stored, saved=saved))


def _modules_with(entries: Iterable[str], export: Export) -> dict[str, nn.Module]:
    """The modules that hold these entries of a state, by name.

    If a file is exported, there are none.
    """
    modules = export.modules_of_model
    names = dict.fromkeys(map(owner_of, entries))
    return {name: modules[name] for name in only(names, modules)}

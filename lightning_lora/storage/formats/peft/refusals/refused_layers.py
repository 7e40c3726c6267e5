"""Which layers PEFT cannot hold, or would compute otherwise: one list of rules, each with its reason."""

from dataclasses import dataclass

import torch

from lightning_lora.errors import listed
from lightning_lora.layers.kinds import LoRALinear
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.counterparts import (
    counterpart_of,
    why_no_counterpart,
)
from lightning_lora.storage.formats.peft.naming.when_loaded import (
    PeftLoading,
    loading_of,
)
from lightning_lora.storage.formats.peft.naming.wrappers import layers_by_tensor
from lightning_lora.storage.formats.peft.reasons import Reason, first_reason
from lightning_lora.storage.formats.peft.refusals.refused_rows import (
    why_exported_rows_differ,
)
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import join, last_component, owner_of, starts_of


@dataclass(frozen=True)
class _Arrival:
    """An export, and what becomes of it when PEFT loads it onto the reader's model."""

    export: Export
    loading: PeftLoading
    lost: set[str]  # the layers of which some tensor would not arrive


def refused_layers(export: Export) -> dict[Reason, list[str]]:
    """Return the layers that PEFT cannot hold, or would compute otherwise, by the reason."""
    arrival = _arrival_of(export)
    refused = dict[Reason, list[str]]()
    for layer in export.stored.layers.values():
        reason = first_reason(_RULES, layer, arrival)
        if reason:
            refused.setdefault(reason, []).append(layer.name)
    return refused


def _arrival_of(export: Export) -> _Arrival:
    """Ask PEFT which layers would arrive.

    It is only asked what becomes of the names of their tensors, so a small tensor stands
    in for each.
    """
    loading = loading_of(export)
    layer_of = layers_by_tensor(export)
    arriving = loading.names_in_file(dict.fromkeys(layer_of, torch.zeros(1, 1)))
    lost = set(without(layer_of, arriving).values())
    return _Arrival(export, loading, lost)


def adapted_around(name: str, stored: StoredAdapters) -> list[str]:
    """Return the adapted layers in which a module lies."""
    return [outer for outer in starts_of(owner_of(name)) if outer in stored.layers]


# The rules


def _because_of_its_kind(layer: StoredLayer, arrival: _Arrival) -> Reason:
    """PEFT has no counterpart for the layer's adapter, or one that computes something else."""
    name_in_layer = layer.matrices[0].parameter_name(Role.MAGNITUDE)
    name = join(layer.name, name_in_layer)
    magnitude = arrival.export.stored.state.get(name)  # None: it has no DoRA
    return why_no_counterpart(layer, magnitude)


def _because_it_is_the_root(layer: StoredLayer, arrival: _Arrival) -> Reason:
    """The reader has the layer alone, with nothing around it."""
    if layer.name == arrival.export.stored.root:
        return (
            'PEFT adapts layers inside a module, not the module itself. Pass root="", '
            "or the module around it."
        )
    return ""


def _because_out_proj_counts_twice(layer: StoredLayer, _: _Arrival) -> Reason:
    """The layer is an attention whose output projection is adapted."""
    if "out_proj.weight" not in layer.shapes:
        return ""
    leaf = last_component(layer.name)
    without_it = f"target_slices={{{leaf!r}: ['q', 'k', 'v']}}"
    return (
        "PEFT 0.21 adds the update of an attention's output projection twice. Train "
        f"again with {without_it}, which leaves that out."
    )


def _because_inside_of_adapted(layer: StoredLayer, arrival: _Arrival) -> Reason:
    """The layer has adapted parameters, and so has a module around it."""
    around = adapted_around(layer.name, arrival.export.stored)
    if around and counterpart_of(layer).is_parameter:
        return (
            f"PEFT finds no parameters inside of {listed(around)}, whose parameters "
            "are adapted too."
        )
    return ""


def _because_of_its_rows(layer: StoredLayer, arrival: _Arrival) -> Reason:
    """Single rows of the layer train, and PEFT computes something else with them."""
    return why_exported_rows_differ(layer, arrival.export) if layer.tokens else ""


def _because_it_does_not_arrive(layer: StoredLayer, arrival: _Arrival) -> Reason:
    """PEFT renames the layer's tensors, whatever their names in the file are."""
    if layer.name in arrival.lost:
        return (
            "PEFT gives their tensors other names when it loads a model of type "
            f"{arrival.loading.model_type!r}."
        )
    return ""


def _because_of_its_name(layer: StoredLayer, arrival: _Arrival) -> Reason:
    """PEFT refuses a layer of this name in a model of the reader's type."""
    if counterpart_of(layer).is_parameter:
        return ""
    name = arrival.export.name_for_reader(layer.name)
    return arrival.loading.why_refused(name)


def _because_taken_for_experts(layer: StoredLayer, arrival: _Arrival) -> Reason:
    """PEFT takes the layer for experts, and refuses its weight as a parameter.

    Named as a parameter, in ``target_parameters``, it would not be taken for experts.
    """
    name = arrival.export.name_for_reader(layer.name)
    is_parameter = counterpart_of(layer).is_parameter
    if is_parameter or not arrival.loading.is_taken_for_experts(name):
        return ""
    config = arrival.export.stored.config
    if layer.adapter_class is LoRALinear and not config.use_dora and not config.dropout:
        return ""
    return (
        "PEFT takes them for experts in a model of type "
        f"{arrival.loading.model_type!r}, unless target_parameters names them, which "
        "it refuses with DoRA, dropout or a quantised weight. Train with "
        "use_dora=False and dropout=0."
    )


_RULES = (
    _because_of_its_kind,
    _because_it_is_the_root,
    _because_out_proj_counts_twice,
    _because_inside_of_adapted,
    _because_of_its_rows,
    _because_it_does_not_arrive,
    _because_of_its_name,
    _because_taken_for_experts,
)
"""In the order in which they are asked: of a layer, the first reason is said."""

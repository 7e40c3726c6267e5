"""Which layers PEFT cannot hold, or would compute otherwise: one list of rules, each with its reason."""

from dataclasses import dataclass

from torch import Tensor

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
from lightning_lora.storage.formats.peft.naming.wrappers import stand_ins_of
from lightning_lora.storage.formats.peft.reasons import Reason, first_reason
from lightning_lora.storage.formats.peft.refusals.refused_rows import (
    why_rows_differ,
    why_rows_of_file_differ,
)
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join, names_not_in, owner_of, starts_of


@dataclass(frozen=True)
class _Loading:
    """What PEFT does when it loads an export onto the reader's model."""

    export: Export
    by_peft: PeftLoading
    lost: list[str]  # the layers whose tensors would not arrive


def refused_layers(export: Export) -> dict[Reason, list[str]]:
    """Return the layers that PEFT cannot hold, or would compute otherwise, by the reason."""
    loading = _loading_of_stand_ins(export)
    refused = dict[Reason, list[str]]()
    for layer in export.stored.layers.values():
        reason = first_reason(_RULES, layer, loading)
        if reason:
            refused.setdefault(reason, []).append(layer.name)
    return refused


def _loading_of_stand_ins(export: Export) -> _Loading:
    """Ask PEFT which layers would arrive.

    Small tensors stand in for theirs, which need no values yet.
    """
    by_peft = loading_of(export)
    stand_ins = stand_ins_of(export)
    of_all_layers = dict[str, Tensor]()
    for tensors in stand_ins.values():
        of_all_layers |= tensors
    arriving = by_peft.names_in_file(of_all_layers)
    lost = [
        layer for layer, tensors in stand_ins.items() if names_not_in(tensors, arriving)
    ]
    return _Loading(export, by_peft, lost)


def adapted_around(name: str, stored: StoredAdapters) -> list[str]:
    """Return the adapted layers in which a module lies."""
    return [outer for outer in starts_of(owner_of(name)) if outer in stored.layers]


# The rules


def _because_of_its_kind(layer: StoredLayer, loading: _Loading) -> Reason:
    """PEFT has no counterpart for its adapter, or one that computes something else."""
    magnitude = layer.matrices[0].parameter_name(Role.MAGNITUDE)
    return why_no_counterpart(
        layer, loading.export.stored.state.get(join(layer.name, magnitude))
    )


def _because_it_is_the_root(layer: StoredLayer, loading: _Loading) -> Reason:
    """The reader has this layer alone."""
    if layer.name == loading.export.stored.root:
        return (
            'PEFT adapts layers inside a module, not the module itself. Pass root="", '
            "or the module around it."
        )
    return ""


def _because_out_proj_counts_twice(layer: StoredLayer, _: _Loading) -> Reason:
    """It is an attention whose output projection is adapted."""
    if "out_proj.weight" not in layer.shapes:
        return ""
    leaf = layer.name.rpartition(".")[2]
    without_it = f"target_slices={{{leaf!r}: ['q', 'k', 'v']}}"
    return (
        "PEFT 0.21 adds the update of an attention's output projection twice; "
        f"{without_it} leaves that out."
    )


def _because_inside_of_adapted(layer: StoredLayer, loading: _Loading) -> Reason:
    """It has adapted parameters, and so has a module around it."""
    around = adapted_around(layer.name, loading.export.stored)
    if around and counterpart_of(layer).is_parameter:
        return (
            f"PEFT finds no parameters inside of {listed(around)}, whose parameters "
            "are adapted too."
        )
    return ""


def _because_of_its_rows(layer: StoredLayer, loading: _Loading) -> Reason:
    """Single rows of it train, and PEFT computes something else with them."""
    export = loading.export
    if not layer.tokens:
        return ""
    if export.modules_for_reader:
        return why_rows_differ(
            export.modules_for_reader, export.name_for_reader(layer.name)
        )
    return why_rows_of_file_differ(layer, export)


def _because_it_does_not_arrive(layer: StoredLayer, loading: _Loading) -> Reason:
    """PEFT renames its tensors, whatever their names in the file."""
    if layer.name in loading.lost:
        return (
            "PEFT gives their tensors other names when it loads a model of type "
            f"{loading.by_peft.model_type!r}."
        )
    return ""


def _because_of_its_name(layer: StoredLayer, loading: _Loading) -> Reason:
    """PEFT refuses a layer of this name in a model of this type."""
    if counterpart_of(layer).is_parameter:
        return ""
    return loading.by_peft.why_refused(layer.name)


def _because_taken_for_experts(layer: StoredLayer, loading: _Loading) -> Reason:
    """PEFT takes it for experts, and it cannot be named as a parameter, which would stay what it is."""
    if counterpart_of(layer).is_parameter or not loading.by_peft.is_taken_for_experts(
        layer.name
    ):
        return ""
    config = loading.export.stored.config
    if layer.adapter_class is LoRALinear and not config.use_dora and not config.dropout:
        return ""
    return (
        "PEFT takes them for experts in a model of type "
        f"{loading.by_peft.model_type!r}, unless target_parameters names them, which "
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

"""Which layers PEFT cannot hold, or would compute otherwise: one list of rules, each with its reason."""

from dataclasses import dataclass
from itertools import chain

from lightning_lora.errors import listed
from lightning_lora.layers.kinds import LoRALinear
from lightning_lora.layers.matrices import Role
from lightning_lora.storage.formats.peft.counterparts import counterpart_of, why_no_counterpart
from lightning_lora.storage.formats.peft.naming.when_loaded import PeftLoading, loading_of
from lightning_lora.storage.formats.peft.naming.wrappers import stand_ins_of
from lightning_lora.storage.formats.peft.reasons import Reason, first_reason
from lightning_lora.storage.formats.peft.refusals.refused_rows import why_rows_differ, why_rows_of_file_differ
from lightning_lora.storage.formats.source import Source
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join, names_not_in, owner_of, starts_of


@dataclass(frozen=True)
class _Export:
    """Adapters to write, and what PEFT does when it loads them onto the reader's model."""

    source: Source
    loading: PeftLoading
    lost: list[str]  # the layers whose tensors would not arrive


def refused_layers(source: Source) -> dict[Reason, list[str]]:
    """Return the layers that PEFT cannot hold, or would compute otherwise, by the reason."""
    export = _export_of(source)
    refused = dict[Reason, list[str]]()
    for layer in source.stored.layers.values():
        reason = first_reason(_RULES, layer, export)
        if reason:
            refused.setdefault(reason, []).append(layer.name)
    return refused


def _export_of(source: Source) -> _Export:
    """Ask PEFT which layers would arrive. Their values need not be there yet."""
    loading = loading_of(source)
    stand_ins = stand_ins_of(source)
    tensors = dict(chain.from_iterable(map(dict.items, stand_ins.values())))
    arriving = loading.names_in_file(tensors)
    lost = [name for name, names in stand_ins.items() if names_not_in(names, arriving)]
    return _Export(source, loading, lost)


def adapted_around(name: str, stored: StoredAdapters) -> list[str]:
    """Return the adapted layers in which a module lies."""
    return [outer for outer in starts_of(owner_of(name)) if outer in stored.layers]


# The rules


def _because_of_its_kind(layer: StoredLayer, export: _Export) -> Reason:
    """PEFT has no counterpart for its adapter, or one that computes something else."""
    magnitude = layer.matrices[0].parameter_name(Role.MAGNITUDE)
    return why_no_counterpart(layer, export.source.stored.state.get(join(layer.name, magnitude)))


def _because_it_is_the_root(layer: StoredLayer, export: _Export) -> Reason:
    """The reader has this layer alone."""
    if layer.name == export.source.stored.root:
        return 'PEFT adapts layers inside a module, not the module itself. Pass root="", or the module around it.'
    return ""


def _because_out_proj_counts_twice(layer: StoredLayer, _: _Export) -> Reason:
    """It is an attention whose output projection is adapted."""
    if "out_proj.weight" not in layer.shapes:
        return ""
    leaf = layer.name.rpartition(".")[2]
    without_it = f"target_slices={{{leaf!r}: ['q', 'k', 'v']}}"
    return f"PEFT 0.21 adds the update of an attention's output projection twice; {without_it} leaves that out."


def _because_inside_of_adapted(layer: StoredLayer, export: _Export) -> Reason:
    """It has adapted parameters, and so has a module around it."""
    around = adapted_around(layer.name, export.source.stored)
    if around and counterpart_of(layer).is_parameter:
        return f"PEFT finds no parameters inside of {listed(around)}, whose parameters are adapted too."
    return ""


def _because_of_its_rows(layer: StoredLayer, export: _Export) -> Reason:
    """Single rows of it train, and PEFT computes something else with them."""
    source = export.source
    if not layer.tokens:
        return ""
    if source.modules_for_reader:
        return why_rows_differ(source.modules_for_reader, source.name_for_reader(layer.name))
    return why_rows_of_file_differ(layer, source)


def _because_it_does_not_arrive(layer: StoredLayer, export: _Export) -> Reason:
    """PEFT renames its tensors, whatever their names in the file."""
    if layer.name in export.lost:
        return f"PEFT gives their tensors other names when it loads a model of type {export.loading.model_type!r}."
    return ""


def _because_of_its_name(layer: StoredLayer, export: _Export) -> Reason:
    """PEFT refuses a layer of this name in a model of this type."""
    if counterpart_of(layer).is_parameter:
        return ""
    return export.loading.why_refused(layer.name)


def _because_taken_for_experts(layer: StoredLayer, export: _Export) -> Reason:
    """PEFT takes it for experts, and it cannot be named as a parameter, which would stay what it is."""
    if counterpart_of(layer).is_parameter or not export.loading.is_taken_for_experts(layer.name):
        return ""
    config = export.source.stored.config
    if layer.adapter_class is LoRALinear and not config.use_dora and not config.dropout:
        return ""
    return (
        f"PEFT takes them for experts in a model of type {export.loading.model_type!r}, unless target_parameters "
        "names them, which it refuses with DoRA, dropout or a quantised weight. Train with use_dora=False and "
        "dropout=0."
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

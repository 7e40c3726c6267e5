"""Single rows of an embedding that train, which PEFT calls trainable tokens: where it computes something else."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from lightning_lora.errors import listed
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.reasons import Reason, first_reason
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.storage.stored_modules import (
    UNKNOWN_MODULE,
    StoredModule,
    input_embedding_in,
)
from lightning_lora.tensors.dicts import only, where
from lightning_lora.tensors.names import find_parameter, join, starts_of


class _Uses(NamedTuple):
    """The layers that use the weight of an embedding of which single rows train."""

    names: list[str]  # such as ["wte", "lm_head"]
    biased: list[str]  # those of them with a bias
    says_tied: bool  # whether a configuration says that the weight is tied
    # the embedding of the model's inputs, if it is another one: PEFT ties layers to it
    # alone
    other_input: str


def why_rows_differ(modules: Mapping[str, nn.Module], name: str) -> Reason:
    """Return why PEFT computes something else with rows of the layer ``name`` among ``modules``."""
    return first_reason(_RULES, _uses_in_model(modules, name))


def why_rows_of_file_differ(layer: StoredLayer, export: Export) -> Reason:
    """Return why PEFT computes something else with a layer's rows, by what a file says of modules."""
    names = [layer.name, *layer.others_with_its_weights()]
    if len(names) > 1 and not export.stored_modules:
        return (
            f"{listed(names)} have one weight. Load the file onto its model, which says "
            "whether PEFT knows that."
        )
    return first_reason(_RULES, _uses_by_file(names, layer, export))


# The rules


def _because_of_bias(uses: _Uses) -> Reason:
    """A layer adds a bias to what it computes with the weight."""
    if uses.biased:
        return (
            f"{listed(uses.biased)} has a bias, which PEFT leaves out with "
            "trainable_token_indices."
        )
    return ""


def _because_tied_by_hand(uses: _Uses) -> Reason:
    """The weight is tied, and no configuration says so."""
    if len(uses.names) > 1 and not uses.says_tied:
        return (
            f"{listed(uses.names)} have one weight, and PEFT knows that only from "
            "config.tie_word_embeddings."
        )
    return ""


def _because_tied_to_another(uses: _Uses) -> Reason:
    """The weight is tied, and PEFT looks only at another layer that has it."""
    if len(uses.names) > 1 and uses.other_input:
        return (
            f"{listed(uses.names)} have one weight, and PEFT ties layers to the "
            f"embedding of the model's inputs, {uses.other_input!r}, alone. If that "
            "has this weight too, name it in trainable_token_indices."
        )
    return ""


_RULES = (_because_of_bias, _because_tied_by_hand, _because_tied_to_another)
"""In the order in which they are asked: the first reason is said."""


# The uses of a weight, in a model and by a file


def _uses_in_model(modules: Mapping[str, nn.Module], name: str) -> _Uses:
    """The uses of the weight of the layer ``name`` among the modules of a model."""
    uses = _layers_with_weight(modules, name)
    biased = list[str]()
    for layer, use in uses.items():
        if getattr(layer, "bias", None) is not None:
            biased.append(use)
    input_embedding = _input_embedding_around(name, modules)
    is_other = input_embedding and modules[input_embedding] is not modules[name]
    return _Uses(
        names=list(uses.values()),
        biased=biased,
        says_tied=_says_tied(modules),
        other_input=input_embedding if is_other else "",
    )


def _uses_by_file(
    names_in_model: Iterable[str], layer: StoredLayer, export: Export
) -> _Uses:
    """The uses of a layer's weight, which have these names, by what a file says of modules."""
    modules = export.stored_modules
    names = list(map(export.name_for_reader, names_in_model))
    input_embedding = _input_embedding_by_file(names[0], modules)
    names_of_layer = map(export.name_for_reader, [layer.name, *layer.other_names])
    is_other = input_embedding not in names_of_layer
    return _Uses(
        names=names,
        biased=list(where(only(modules, names), _has_bias)),
        says_tied=any(module.says_tied for module in modules.values()),
        other_input=input_embedding if is_other else "",
    )


def _has_bias(module: StoredModule) -> bool:
    """Whether a module has a bias, by what a file says of it."""
    return module.has_bias


# The embedding of the inputs of the outermost model around a layer


def _input_embedding_around(layer: str, modules: Mapping[str, nn.Module]) -> str:
    """The embedding's name among the modules of a model. Empty: no module says which one it is."""
    for outer in ("", *starts_of(layer)):
        inner = input_embedding_in(modules[outer])
        if inner:
            return join(outer, inner)
    return ""


def _input_embedding_by_file(layer: str, modules: Mapping[str, StoredModule]) -> str:
    """The embedding's name, by what a file says of modules. Empty: it does not say which one it is."""
    for outer in ("", *starts_of(layer)):
        inner = modules.get(outer, UNKNOWN_MODULE).input_embedding
        if inner:
            return join(outer, inner)
    return ""


# The layers with one weight, in a model


def _layers_with_weight(
    modules: Mapping[str, nn.Module], name: str
) -> dict[nn.Module, str]:
    """The layers that have the weight of this one, each with the last of its names."""
    weight = find_parameter(modules[name], "weight")
    uses = dict[nn.Module, str]()
    for other, module in modules.items():
        if find_parameter(module, "weight") is weight:
            uses[module] = other
    return uses


def _says_tied(modules: Mapping[str, nn.Module]) -> bool:
    """Whether a configuration inside says that the embeddings are tied."""
    for module in modules.values():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            return True
    return False

"""Single rows of an embedding that train, which PEFT calls trainable tokens: where it computes something else."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_lora.errors import listed
from lightning_lora.storage.formats.export import Export
from lightning_lora.storage.formats.peft.reasons import Reason, first_reason
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.storage.stored_modules import (
    UNKNOWN_MODULE,
    StoredModule,
    stored_module,
)
from lightning_lora.tensors.dicts import only, where, with_values
from lightning_lora.tensors.names import find_parameter, join, starts_of


@dataclass(frozen=True)
class _Embedding:
    """An embedding of which single rows train."""

    name: str
    all_names: list[str]  # several, if the model uses it in several places
    uses: list[str]  # the layers with its weight, and itself: ["wte", "lm_head"]
    modules: Mapping[str, StoredModule]  # what is known of the modules of its model

    @property
    def is_tied(self) -> bool:
        """Whether another layer has its weight."""
        return len(self.uses) > 1

    def biased_uses(self) -> list[str]:
        """Return the layers with its weight that have a bias."""
        return list(where(only(self.modules, self.uses), _has_bias))

    def is_said_to_be_tied(self) -> bool:
        """Return whether a configuration inside the model says that embeddings are tied."""
        return any(module.says_tied for module in self.modules.values())

    def other_input(self) -> str:
        """Return the embedding of the inputs of the outermost model around it.

        Empty: it is this embedding itself, or no module says which one it is.
        """
        for outer in ("", *starts_of(self.name)):
            inner = self.modules.get(outer, UNKNOWN_MODULE).input_embedding
            if inner:
                of_inputs = join(outer, inner)
                return "" if of_inputs in self.all_names else of_inputs
        return ""


def _has_bias(module: StoredModule) -> bool:
    """Whether a module has a bias."""
    return module.has_bias


def why_rows_differ(modules: Mapping[str, nn.Module], name: str) -> Reason:
    """Return why PEFT computes something else with rows of the layer ``name`` among ``modules``."""
    all_names = with_values(modules, {modules[name]})
    described = {name: stored_module(module) for name, module in modules.items()}
    embedding = _Embedding(
        name=name,
        all_names=list(all_names),
        uses=_layers_with_weight(modules, name),
        modules=described,
    )
    return first_reason(_RULES, embedding)


def _layers_with_weight(modules: Mapping[str, nn.Module], name: str) -> list[str]:
    """The layers that have the weight of this one: of each, the last of its names."""
    weight = find_parameter(modules[name], "weight")
    names = dict[nn.Module, str]()
    for other, module in modules.items():
        if find_parameter(module, "weight") is weight:
            names[module] = other
    return list(names.values())


def why_exported_rows_differ(layer: StoredLayer, export: Export) -> Reason:
    """Return why PEFT computes something else with the rows of a layer that is exported."""
    if export.inner is not None:
        name = export.name_for_reader(layer.name)
        return why_rows_differ(export.modules_for_reader, name)
    return _why_rows_of_file_differ(layer, export)


def _why_rows_of_file_differ(layer: StoredLayer, export: Export) -> Reason:
    """Why PEFT computes something else with a layer's rows, by what an exported file says of modules."""
    all_names = [layer.name, *layer.other_names]
    uses = [layer.name, *layer.others_with_its_weights()]
    if len(uses) > 1 and not export.stored_modules:
        return (
            f"{listed(uses)} have one weight. Load the file onto its model, which says "
            "whether PEFT knows that."
        )
    embedding = _Embedding(
        name=export.name_for_reader(layer.name),
        all_names=list(map(export.name_for_reader, all_names)),
        uses=list(map(export.name_for_reader, uses)),
        modules=export.stored_modules,
    )
    return first_reason(_RULES, embedding)


# The rules


def _because_of_bias(embedding: _Embedding) -> Reason:
    """A layer adds a bias to what it computes with the weight."""
    biased = embedding.biased_uses()
    if biased:
        return (
            f"{listed(biased)} has a bias, which PEFT leaves out with "
            "trainable_token_indices."
        )
    return ""


def _because_tied_by_hand(embedding: _Embedding) -> Reason:
    """The weight is tied, and no configuration says so."""
    if embedding.is_tied and not embedding.is_said_to_be_tied():
        return (
            f"{listed(embedding.uses)} have one weight, and PEFT knows that only from "
            "config.tie_word_embeddings."
        )
    return ""


def _because_tied_to_another(embedding: _Embedding) -> Reason:
    """The weight is tied, and the inputs have another embedding: PEFT ties layers to that alone."""
    other_input = embedding.other_input()
    if embedding.is_tied and other_input:
        return (
            f"{listed(embedding.uses)} have one weight, and PEFT ties layers to the "
            f"embedding of the model's inputs, {other_input!r}, alone. If that "
            "has this weight too, name it in trainable_token_indices."
        )
    return ""


_RULES = (_because_of_bias, _because_tied_by_hand, _because_tied_to_another)
"""In the order in which they are asked: the first reason is said."""

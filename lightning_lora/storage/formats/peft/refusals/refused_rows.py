"""Single rows of an embedding that train, which PEFT calls trainable tokens: where it computes something else."""

from collections.abc import Mapping, Sequence

from torch import nn

from lightning_lora.errors import listed
from lightning_lora.storage.formats.writing import Source
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.names import find_parameter


def why_not_rows(modules: Mapping[str, nn.Module], name: str) -> str:
    """Return why PEFT computes something else with rows of the layer ``name`` among ``modules``, or nothing."""
    uses = _uses_of_weight(modules, name)
    biased = [use for layer, use in uses.items() if getattr(layer, "bias", None) is not None]
    return _why_not(list(uses.values()), biased, says_tied=_says_tied(modules))


def why_not_rows_of_file(layer: StoredLayer, source: Source) -> str:
    """Return why PEFT computes something else with a layer's rows, by what a file says of modules, or nothing."""
    uses = [layer.name, *layer.others_with_its_weights()]
    if len(uses) > 1 and not source.described:
        return f"{listed(uses)} have one weight. Load the file onto its model, which says whether PEFT knows that."
    uses_for_reader = list(map(source.name_for_reader, uses))
    known = only(source.described, uses_for_reader)
    biased = [use for use, module in known.items() if module.has_bias]
    says_tied = any(module.says_tied for module in source.described.values())
    return _why_not(uses_for_reader, biased, says_tied=says_tied)


def _why_not(uses: Sequence[str], biased: Sequence[str], *, says_tied: bool) -> str:
    """Why PEFT computes something else with rows of a weight that has these uses, or nothing."""
    if biased:
        return f"{listed(biased)} has a bias, which PEFT leaves out with trainable_token_indices."
    if len(uses) > 1 and not says_tied:
        return f"{listed(uses)} have one weight, and PEFT knows that only from config.tie_word_embeddings."
    return ""


def _uses_of_weight(modules: Mapping[str, nn.Module], name: str) -> dict[nn.Module, str]:
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

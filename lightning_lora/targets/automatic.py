"""The layers that the words ``"all-linear"`` and ``"all"`` mean."""

from typing import Any

from torch import nn

from lightning_lora.layers import ADAPTERS, adapter_for
from lightning_lora.targets.lookup import OUTPUT_HEAD, Lookup
from lightning_lora.targets.matching import ending_in
from lightning_lora.tensors.names import (
    find_parameter,
    is_in,
    owner_of,
    with_all_inside,
)


def automatic_targets(lookup: Lookup, word: str) -> dict[str, nn.Module]:
    """Return the layers that ``"all-linear"`` or ``"all"`` means.

    Those whose weight is computed are among them: callers leave them out, and a guard
    names them.
    """
    kinds = set(ADAPTERS.values())
    left_out = _inside_attentions(lookup)
    if word == "all-linear":
        kinds = {kind for kind in kinds if kind.lora_is_linear}
        left_out |= _output_heads(lookup)
    modules = lookup.modules.items()
    return {
        name: layer
        for name, layer in modules
        if adapter_for(layer) in kinds and layer not in left_out
    }


def _inside_attentions(lookup: Lookup) -> set[Any]:
    """The modules inside torch's attentions, which read their weights without calling them."""
    attentions = lookup.of_type(nn.MultiheadAttention).values()
    return with_all_inside(attentions).difference(attentions)


def _output_heads(lookup: Lookup) -> set[Any]:
    """The output heads of language models: transformers names them, others are tied to an embedding, or look so."""
    return {
        *_with_weight_of_embedding(lookup),
        *_heads_that_models_name(lookup),
        *_heads_by_name_and_size(lookup),
    }


def _with_weight_of_embedding(lookup: Lookup) -> list[nn.Module]:
    """The embeddings, and layers that are tied to one."""
    # not read as attributes: a computed weight (spectral_norm, for example) may change
    # when it is read
    embeddings = lookup.of_type(nn.Embedding).values()
    weights = {find_parameter(embedding, "weight") for embedding in embeddings}
    weights.discard(None)
    return [
        module
        for module in lookup.modules.values()
        if find_parameter(module, "weight") in weights
    ]


def _heads_that_models_name(lookup: Lookup) -> list[object]:
    """What models say that their output heads are, as those of transformers do.

    It may be None.
    """
    heads = []
    for model in lookup.all_modules.values():
        ask = getattr(model, "get_output_embeddings", None)
        if callable(ask):
            heads.append(ask())
    return heads


def _heads_by_name_and_size(lookup: Lookup) -> list[nn.Module]:
    """Output heads that only their names and sizes tell, as in litgpt: beside an embedding of as many words."""
    linears = lookup.of_type(nn.Linear)
    heads: list[nn.Module] = []
    for name in ending_in(linears, [OUTPUT_HEAD]):
        if linears[name].out_features in _numbers_of_words(lookup, owner_of(name)):
            heads.append(linears[name])
    return heads


def _numbers_of_words(lookup: Lookup, model: str) -> set[int]:
    """How many words the embeddings in a module have. The model itself has no name."""
    embeddings = lookup.of_type(nn.Embedding)
    return {
        embedding.num_embeddings
        for name, embedding in embeddings.items()
        if is_in(name, model)
    }

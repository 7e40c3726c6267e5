"""The layers that the words ``"all-linear"`` and ``"all"`` mean."""

from typing import Any

from torch import nn

from lightning_lora.layers import ADAPTERS, adapter_for
from lightning_lora.targets.lookup import OUTPUT_HEAD, Names
from lightning_lora.targets.matching import ending_in
from lightning_lora.tensors.names import find_parameter, is_in, owner_of, with_all_inside


def automatic_targets(names: Names, word: str) -> dict[str, nn.Module]:
    """Return the layers that ``"all-linear"`` or ``"all"`` means.

    Those whose weight is computed are among them: callers leave them out, and a guard names them.
    """
    kinds = set(ADAPTERS.values())
    left_out = _inside_attentions(names)
    if word == "all-linear":
        kinds = {kind for kind in kinds if kind.lora_is_linear}
        left_out |= _output_heads(names)
    modules = names.modules.items()
    return {name: layer for name, layer in modules if adapter_for(layer) in kinds and layer not in left_out}


def _inside_attentions(names: Names) -> set[Any]:
    """The modules inside torch's attentions, which read their weights without calling them."""
    attentions = names.of_type(nn.MultiheadAttention).values()
    return with_all_inside(attentions).difference(attentions)


def _output_heads(names: Names) -> set[Any]:
    """The output heads of language models: transformers names them, others are tied to an embedding, or look so."""
    return {*_with_weight_of_embedding(names), *_heads_that_models_name(names), *_heads_by_name_and_size(names)}


def _with_weight_of_embedding(names: Names) -> list[nn.Module]:
    """The embeddings, and layers that are tied to one."""
    # not read as attributes: a computed weight (spectral_norm, for example) may change when it is read
    embeddings = names.of_type(nn.Embedding).values()
    weights = {find_parameter(embedding, "weight") for embedding in embeddings}
    weights.discard(None)
    return [module for module in names.modules.values() if find_parameter(module, "weight") in weights]


def _heads_that_models_name(names: Names) -> list[object]:
    """What models say that their output heads are, as those of transformers do. It may be None."""
    heads = []
    for model in names.all_modules.values():
        ask = getattr(model, "get_output_embeddings", None)
        if callable(ask):
            heads.append(ask())
    return heads


def _heads_by_name_and_size(names: Names) -> list[nn.Module]:
    """Output heads that only their names and sizes tell, as in litgpt: beside an embedding of as many words."""
    linears = names.of_type(nn.Linear)
    heads: list[nn.Module] = []
    for name in ending_in(linears, [OUTPUT_HEAD]):
        if linears[name].out_features in _numbers_of_words(names, owner_of(name)):
            heads.append(linears[name])
    return heads


def _numbers_of_words(names: Names, model: str) -> set[int]:
    """How many words the embeddings in a module have. The model itself has no name."""
    embeddings = names.of_type(nn.Embedding)
    return {embedding.num_embeddings for name, embedding in embeddings.items() if is_in(name, model)}

"""The rows of embeddings that ``trainable_token_indices`` names."""

from collections.abc import Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig, matches
from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import AdaptedMatrix, LoRAEmbedding, LoRALinear, LoRATokens, adapter_for
from lightning_lora.targets.lookup import Names, why_not
from lightning_lora.tensors.names import held_parameter, owner_of, plain_module, starts_of
from lightning_lora.tensors.shards import is_dtensor

_ARGUMENT = "trainable_token_indices"
_USUAL = "embed_tokens"  # the name that most language models have for their input embedding


def token_rows(
    names: Names, config: LoRAConfig, busy: Container[object]
) -> tuple[dict[nn.Module, AdaptedMatrix], set[nn.Module]]:
    """Return the embeddings whose rows train, and all layers with their weights. Other arguments name ``busy`` ones."""
    given = config.trainable_token_indices or {}
    if not isinstance(given, Mapping):
        given = dict.fromkeys(_input_embeddings(names, given), given)
    found, rows_of = dict[nn.Module, AdaptedMatrix](), dict[nn.Module, object]()
    for key, rows in given.items():
        for name in [key] if key in names.modules else names.find(_ARGUMENT, (key,)):
            layer = names.modules[name]
            weight = held_parameter(layer, "weight")
            owners = [owner_of(other) for other, p in names.parameters.items() if p is weight]
            for owner in (name, *owners):
                why = "target_modules, target_parameters or modules_to_save name it too"
                if names.modules.get(owner) in busy or (why := _why_not(names, owner, rows)):
                    raise TargetError(f"{_ARGUMENT} means {name!r} of {names.title}. {owner!r} does not fit: {why}.")
            if rows_of.get(layer, rows) != rows:
                raise TargetError(f"{_ARGUMENT} has other rows for {name!r} than for a name of the same weight.")
            if layer not in rows_of:
                found[layer] = replace(LoRATokens.lora_matrices_of(layer)[0], tokens=tuple(rows))
                rows_of |= dict.fromkeys(map(names.modules.__getitem__, owners), rows)
    return found, set(rows_of)


def _input_embeddings(names: Names, rows: Sequence[int]) -> list[str]:
    """What a list means: the input embedding of each outermost model that has one, or else ``embed_tokens``."""
    found: dict[str, str] = {}  # by the model that has it
    for name, module in {"": plain_module(names.model), **names.modules}.items():
        ask = getattr(module, "get_input_embeddings", None)
        if callable(ask) and found.keys().isdisjoint(["", *starts_of(name)]):
            with suppress(NotImplementedError):
                (found[name],) = names.first_names({plain_module(ask())})
    if found:
        return list(found.values())
    if any(matches(_USUAL, name) for name in names.modules):
        return [_USUAL]
    embeddings = [name for name, module in names.modules.items() if isinstance(module, nn.Embedding)]
    if not embeddings:
        raise TargetError(f"{_ARGUMENT} is for embeddings, and {names.title} has no nn.Embedding. Leave it out.")
    raise TargetError(
        f"{_ARGUMENT}={list(rows)} names no embedding, and {names.title} does not say which one is meant (by "
        f"get_input_embeddings, or the name {_USUAL!r}). It has {listed(embeddings)}. Name it: "
        f"{_ARGUMENT}={{{embeddings[0]!r}: {list(rows)}}}."
    )


def _why_not(names: Names, name: str, rows: Iterable[int]) -> str:
    layer: Any = names.modules.get(name, names.model)
    if adapter_for(layer) not in (LoRAEmbedding, LoRALinear):
        return f"a {type(layer).__name__} is neither an nn.Embedding nor an nn.Linear"
    if why := why_not(names, name, layer):
        return why
    if is_dtensor(layer.weight):
        return "its weight is sharded (FSDP2 or tensor parallelism), where single rows cannot train"
    beyond = [row for row in rows if row >= len(layer.weight)]
    return f"it has {len(layer.weight)} rows, and no {beyond}. Resize it first" if beyond else ""

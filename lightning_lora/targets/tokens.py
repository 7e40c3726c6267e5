"""The rows of embeddings that ``trainable_token_indices`` names."""

from collections.abc import Mapping
from contextlib import suppress

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import adapter_for
from lightning_lora.layers.kinds import LoRAEmbedding, LoRALinear
from lightning_lora.targets.lookup import Names, why_not
from lightning_lora.tensors.names import owner_of, plain_module, starts_of
from lightning_lora.tensors.shards import is_dtensor

_ARGUMENT = "trainable_token_indices"


def token_rows(names: Names, config: LoRAConfig) -> tuple[dict[nn.Module, tuple[int, ...]], set[nn.Module]]:
    """Return the rows to train of each embedding, and all layers that have its weight. Of tied ones, the first trains.

    A list means the input embedding of the outermost model that has ``get_input_embeddings``, or else ``embed_tokens``.
    """
    given, asked = config.trainable_token_indices, dict[str, tuple[int, ...]]()
    for key, rows in (
        given if isinstance(given, Mapping) else {_input_embedding(names): given} if given else {}
    ).items():
        for name in [key] if key in names.modules else names.find(_ARGUMENT, (key,)):
            asked.setdefault(name, tuple(rows))
    found, uses = dict[nn.Module, tuple[int, ...]](), dict[nn.Module, tuple[int, ...]]()
    for name, rows in asked.items():
        layer = names.modules[name]
        if why := _why_not_layer(names, name) or _why_not_rows(layer, rows):
            raise TargetError(f"{_ARGUMENT} means {name!r} of {names.title}, but {why}.")
        if uses.get(layer, rows) != rows:
            raise TargetError(f"{_ARGUMENT} names other rows for {name!r} than for a layer that has its weight too.")
        if layer in uses:
            continue
        found[layer] = rows
        for other, parameter in names.parameters.items():
            if parameter is layer._parameters["weight"]:
                if why := _why_not_layer(names, owner_of(other)):
                    raise TargetError(f"{_ARGUMENT} means {name!r}, whose weight is {other!r} too, but {why}.")
                uses[names.modules[owner_of(other)]] = rows
    return found, set(uses)


def _input_embedding(names: Names) -> str:
    found: dict[str, str] = {}  # by the model that has it
    for name, module in {"": plain_module(names.model), **names.modules}.items():
        ask = getattr(module, "get_input_embeddings", None)
        if callable(ask) and found.keys().isdisjoint(["", *starts_of(name)]):
            with suppress(NotImplementedError):
                (found[name],) = names.first_names({plain_module(ask())})
    if len(found) > 1:
        raise TargetError(f"{_ARGUMENT} is a list, and {names.title} has several models: {listed(found)}. {_GIVE}")
    return next(iter(found.values()), "embed_tokens")


_GIVE = "Give a dict from embeddings to rows, such as {'model.embed_tokens': [50257, 50258]}."


def _why_not_layer(names: Names, name: str) -> str | None:
    layer = names.modules.get(name, names.model)
    if adapter_for(layer) not in (LoRAEmbedding, LoRALinear):
        return f"a {type(layer).__name__} is neither an nn.Embedding nor an nn.Linear"
    return why_not(names, name, layer)


def _why_not_rows(layer: nn.Module, rows: tuple[int, ...]) -> str | None:
    weight = layer._parameters["weight"]
    assert weight is not None  # checked before
    if is_dtensor(weight):
        return "its weight is sharded (FSDP2 or tensor parallelism), where single rows cannot train"
    if beyond := [row for row in rows if row >= len(weight)]:
        return f"it has {len(weight)} rows, and no {listed(map(str, beyond))}. Resize the embeddings first"
    return None


def check_free(names: Names, uses: set[nn.Module], busy: set[nn.Module]) -> None:
    """Refuse embeddings with rows that train, and layers tied to them, if other arguments name them too."""
    if both := names.first_names(uses & busy):
        raise TargetError(
            f"{_ARGUMENT} trains rows of {listed(both)}, or of what is tied to it, and target_modules, "
            "target_parameters or modules_to_save name it too. Leave it out in one of them."
        )

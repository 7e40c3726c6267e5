"""The rows of embeddings that ``trainable_token_indices`` names."""

from collections.abc import Container, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import (
    AdaptedMatrix,
    LoRAEmbedding,
    LoRALinear,
    LoRATokens,
    adapter_for,
)
from lightning_lora.targets.adaptable import why_not_adaptable
from lightning_lora.targets.find_names import find_names
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.matching import ending_in
from lightning_lora.tensors.names import (
    find_parameter,
    owner_of,
    plain_module,
    starts_of,
)
from lightning_lora.tensors.shards import is_dtensor

_ARGUMENT = "trainable_token_indices"
# the name that most language models have for their input embedding
_USUAL = "embed_tokens"


def find_token_rows(
    lookup: Lookup, config: LoRAConfig, named_elsewhere: Container[object]
) -> "TokenRows":
    """Return the embeddings whose rows train.

    Other arguments mean the modules that are ``named_elsewhere``.
    """
    found = TokenRows(lookup, named_elsewhere)
    for key, rows in _rows_by_key(lookup, config.trainable_token_indices).items():
        for name in _meant_by(lookup, key):
            found.add(name, rows)
    return found


def _rows_by_key(
    lookup: Lookup, given: Sequence[int] | Mapping[str, Sequence[int]] | None
) -> Mapping[str, Sequence[int]]:
    """The rows by names of embeddings, or by ends of these."""
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return given
    return dict.fromkeys(_input_embeddings(lookup, given), given)


def _meant_by(lookup: Lookup, key: str) -> list[str]:
    """The names of embeddings that a key means.

    The whole name of a module means this module alone. Other keys may be the ends of
    several names.
    """
    if key in lookup.modules:
        return [key]
    return find_names(lookup, _ARGUMENT, (key,))


class TokenRows:
    """The embeddings whose rows train, and the layers that are tied to them.

    Several layers may have one weight, such as an embedding and an output head. All of
    them are in ``layers``. Only the first of them that the argument names gets the
    adapter: it is in ``matrices``, with the matrix that its adapter updates.
    """

    def __init__(self, lookup: Lookup, named_elsewhere: Container[object]) -> None:
        self._lookup = lookup
        self._named_elsewhere = named_elsewhere
        self.matrices: dict[nn.Module, AdaptedMatrix] = {}
        self._rows: dict[nn.Module, Sequence[int]] = {}  # of each of the layers

    @property
    def layers(self) -> Set[nn.Module]:
        """All layers that have a weight of which rows train."""
        return self._rows.keys()

    def add(self, name: str, rows: Sequence[int]) -> None:
        """Let rows of an embedding train, if it and all that share its weight can."""
        layer = self._lookup.modules[name]
        owners = self._owners_of_weight(layer)
        for owner in (name, *owners):  # there are no owners if the weight is computed
            why = self._why_rows_cannot_train(owner, rows)
            if why:
                raise TargetError(
                    f"{_ARGUMENT} means {name!r} of {self._lookup.title}. {owner!r} "
                    f"does not fit: {why}."
                )
        if layer not in self._rows:
            self.matrices[layer] = _matrix_of_rows(layer, rows)
            for owner in owners:
                self._rows[self._lookup.all_modules[owner]] = rows
        elif self._rows[layer] != rows:
            raise TargetError(
                f"{_ARGUMENT} has other rows for {name!r} than for a name of the same "
                "weight."
            )

    def _owners_of_weight(self, layer: nn.Module) -> list[str]:
        """The modules that hold a layer's weight."""
        weight = find_parameter(layer, "weight")
        return [
            owner_of(name)
            for name, parameter in self._lookup.parameters.items()
            if parameter is weight
        ]

    def _why_rows_cannot_train(self, name: str, rows: Iterable[int]) -> str:
        """Why rows of a module's weight cannot train, or nothing."""
        layer: Any = self._lookup.all_modules[name]
        if layer in self._named_elsewhere:
            return "target_modules, target_parameters or modules_to_save name it too"
        if adapter_for(layer) not in (LoRAEmbedding, LoRALinear):
            return (
                f"a {type(layer).__name__} is neither an nn.Embedding nor an nn.Linear"
            )
        why = why_not_adaptable(self._lookup.modules, name, layer)
        if why:
            return why
        if is_dtensor(layer.weight):
            return (
                "its weight is sharded (FSDP2 or tensor parallelism), where single "
                "rows cannot train"
            )
        beyond = [row for row in rows if row >= len(layer.weight)]
        if beyond:
            return f"it has {len(layer.weight)} rows, and no {beyond}. Resize it first"
        return ""


def _matrix_of_rows(layer: nn.Module, rows: Iterable[int]) -> AdaptedMatrix:
    (matrix,) = LoRATokens.lora_matrices_of(layer)
    return replace(matrix, tokens=tuple(rows))


def _input_embeddings(lookup: Lookup, rows: Sequence[int]) -> list[str]:
    """The keys that a list stands for: the input embedding of each outermost model that names one, or the usual end.

    Those of models are whole names. The usual end of a name is ``embed_tokens``.
    """
    found = _embeddings_that_models_name(lookup)
    if found:
        return found
    if ending_in(lookup.modules, [_USUAL]):
        return [_USUAL]
    raise TargetError(_about_unknown_embedding(lookup, rows))


def _embeddings_that_models_name(lookup: Lookup) -> list[str]:
    """The input embedding of each outermost model that says which it is, as those of transformers do.

    The first name of each. A model inside another one that has said it is not asked.
    """
    found: dict[str, str] = {}  # by the name of the model
    for name, model in lookup.all_modules.items():
        # the model itself has the name ""
        around = {"", *starts_of(name)}
        if found.keys() & around:
            continue
        for embedding in lookup.first_names(_named_by(model)):
            found[name] = embedding
    return list(found.values())


def _named_by(model: nn.Module) -> set[nn.Module]:
    """The input embedding that a model names: none if it cannot, or has none."""
    ask = getattr(model, "get_input_embeddings", None)
    if not callable(ask):
        return set()
    try:
        embedding = ask()
    except NotImplementedError:
        return set()
    return {plain_module(embedding)} if isinstance(embedding, nn.Module) else set()


def _about_unknown_embedding(lookup: Lookup, rows: Sequence[int]) -> str:
    """What to do if nothing says which embedding a list of rows means."""
    embeddings = lookup.embeddings()
    if not embeddings:
        return (
            f"{_ARGUMENT} is for embeddings, and {lookup.title} has no nn.Embedding. "
            "Leave it out."
        )
    return (
        f"{_ARGUMENT}={list(rows)} names no embedding, and {lookup.title} does not say "
        "which one is meant (by "
        f"get_input_embeddings, or the name {_USUAL!r}). It has {listed(embeddings)}. "
        "Name it: "
        f"{_ARGUMENT}={{{embeddings[0]!r}: {list(rows)}}}."
    )

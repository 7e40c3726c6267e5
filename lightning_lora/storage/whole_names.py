"""Configurations that name each layer in full."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import AdaptedMatrix, LoRAParameters
from lightning_lora.layers.each_kind.attention import LoRAAttention
from lightning_lora.layers.each_kind.recurrent import LoRARecurrent
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.names import join


def by_whole_names(
    layers: Iterable[StoredLayer], settings: LoRAConfig, present: Collection[str]
) -> LoRAConfig:
    """Return a configuration that names each of these layers in full, with its own rank and scaling.

    Args:
        layers: The layers.
        settings: The configuration that has all other arguments.
        present: The names of all modules in the model.
    """
    targets = _Targets(use_rslora=settings.use_rslora)
    for layer in layers:
        targets.add(layer)
    return replace(settings, **targets.arguments(present))


@dataclass
class _Targets:
    """The arguments of a configuration that name layers, and by each name its rank and alpha."""

    use_rslora: bool
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    slices: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Sequence[int]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def arguments(self, present: Collection[str]) -> dict[str, Any]:
        """Return the arguments by which these targets, of all modules that are ``present``, are adapted alone."""
        # those of the first target: the patterns below have those of the others
        r, *_ = self.ranks.values()
        alpha, *_ = self.alphas.values()
        named = {
            "target_parameters": self.parameters,
            "target_slices": self.slices,
            "trainable_token_indices": self.tokens,
            "rank_pattern": _others_than(r, self.ranks),
            "alpha_pattern": _others_than(alpha, self.alphas),
        }
        return {
            "r": r,
            "alpha": alpha,
            "target_modules": list_or_expression(self.modules, present),
            "exclude_modules": None,
            **{argument: value or None for argument, value in named.items()},
        }

    def add(self, layer: StoredLayer) -> None:
        """Name one more layer: by its parameters, by the rows that train, or as a module, perhaps with its slices."""
        if layer.kind == LoRAParameters.__name__:
            for matrix in layer.matrices:
                self._add_parameter(layer, matrix)
            return
        # by one name, a configuration gives one rank and one scaling to all matrices of
        # a layer: so these have none of their own, as parameters may have
        self._set_numbers(layer.name, layer.r, layer.scaling)
        if layer.tokens:
            self.tokens[layer.name] = layer.tokens
            return
        self.modules.append(layer.name)
        # the matrices of a module have names if target_slices chooses among them
        if all(matrix.name for matrix in layer.matrices):
            self.slices[_exactly(layer.name)] = _slices(layer)

    def _add_parameter(self, layer: StoredLayer, matrix: AdaptedMatrix) -> None:
        """Name a parameter of a layer."""
        name = join(layer.name, matrix.weight)
        r = matrix.rank_for(layer.r)
        scaling = matrix.scaling_for(layer.scaling)
        self._set_numbers(name, r, scaling)
        self.parameters.append(name)

    def _set_numbers(self, name: str, r: int, scaling: float) -> None:
        """Set the rank and alpha of one name.

        Alpha is rounded, as a user would give it, if that makes the same scaling.
        """
        divisor = r**0.5 if self.use_rslora else r  # scaling = alpha / divisor
        alpha = scaling * divisor
        as_given = round(alpha, 9)
        self.ranks[name] = r
        self.alphas[name] = as_given if as_given / divisor == scaling else alpha


def _others_than(usual: float, numbers: Mapping[str, float]) -> dict[str, float]:
    """A pattern for the names whose number is not the usual one: ``{"^head": 8}``."""
    return {
        _exactly(name): number for name, number in numbers.items() if number != usual
    }


def _exactly(name: str) -> str:
    """An expression for one name alone.

    Patterns match the ends of names, so the beginning is what is left to fix.
    """
    return f"^{re.escape(name)}"


def _slices(layer: StoredLayer) -> Any:
    """The value of ``target_slices`` for a layer: names, or names with their rows."""
    if layer.kind in (LoRAAttention.__name__, LoRARecurrent.__name__):
        return [matrix.name for matrix in layer.matrices]
    rows = dict[str, list[int]]()
    for matrix in layer.matrices:
        end = matrix.first + matrix.writes
        rows[matrix.name] = [matrix.first, end]
    return rows


def list_or_expression(names: list[str], present: Collection[str]) -> list[str] | str:
    """Return a list of names, or an expression if a list would match more.

    ``present``: the names of all modules.
    """
    if _match_no_other(names, present):
        return names
    return expression_of(names)


def expression_of(names: Iterable[str]) -> str:
    """Return an expression that matches these names alone."""
    return "|".join(map(re.escape, names))


def _match_no_other(names: list[str], present: Collection[str]) -> bool:
    """Whether no other module's name ends with one of these names, as an entry of a list may."""
    others = set(present) - set(names)
    ends = set[str]()
    for other in others:
        ends.update(_ends_of(other))
    return ends.isdisjoint(names)


def _ends_of(name: str) -> list[str]:
    """The name without its first components: ``a.b.c``, ``b.c`` and ``c``."""
    ends = [name]
    while "." in name:
        _, _, name = name.partition(".")
        ends.append(name)
    return ends

"""Names that differ by one prefix: those in a file, and those in a model or in another file."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from os.path import commonprefix
from typing import Any, TypeVar

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import AdaptedMatrix, LoRAParameters
from lightning_lora.layers.attention import LoRAAttention
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.model.view import View
from lightning_lora.storage.stored_layers import StoredLayer
from lightning_lora.tensors.named import renamed, without
from lightning_lora.tensors.names import is_in, join

Value = TypeVar("Value")


@dataclass(frozen=True)
class Renaming:
    """How names in a file become names in a model: one prefix takes the place of another."""

    there: str = ""  # the prefix of all names in the file
    here: str = ""  # what takes its place in the model

    def name_here(self, name: str) -> str:
        """Return the model's name for a name in the file."""
        return _exchange(name, self.there, self.here)

    def name_there(self, name: str) -> str:
        """Return the file's name for a name in the model."""
        return _exchange(name, self.here, self.there)

    def names_here(self, names: Iterable[str]) -> list[str]:
        """Return the model's names for names in the file."""
        return [self.name_here(name) for name in names]

    def with_names_here(self, named: Mapping[str, Value]) -> dict[str, Value]:
        """Return what a file holds by name, by the model's names."""
        return renamed(named, self.name_here)

    def told(self, title: str) -> str:
        """Return a message that names both prefixes. ``title`` is the model, or the other file."""
        there, here = _beginning_of_names(self.there), _beginning_of_names(self.here)
        return f"The names in the file {there}; in {title} they {here}. They are taken for the same model."


def _exchange(name: str, old_prefix: str, new_prefix: str) -> str:
    """The name with the new prefix, if it has the old one."""
    if not is_in(name, old_prefix):
        return name
    rest = name[len(old_prefix) :].removeprefix(".")
    return join(new_prefix, rest)


def _beginning_of_names(prefix: str) -> str:
    """How names with this prefix begin, in a message."""
    return f"begin with {prefix!r}" if prefix else "have no prefix"


def entries_inside(prefix: str, named: Mapping[str, Value]) -> dict[str, Value]:
    """Return what is ``prefix``, or lies inside it."""
    return {name: value for name, value in named.items() if is_in(name, prefix)}


def names_outside(prefix: str, names: Iterable[str]) -> list[str]:
    """Return the names that are not ``prefix``, and do not lie inside it."""
    return [name for name in names if not is_in(name, prefix)]


SAME_NAMES = Renaming()


# Which renaming makes a file fit


def find_renamings(
    names: Sequence[str], known: Collection[str], *, root_there: str = "", root_here: str = ""
) -> list[Renaming]:
    """Return the ways to exchange one prefix so that all names of a file are known.

    The same names come first, then those below each side's root. Only if neither fits, other prefixes are tried.
    """
    for renaming in (SAME_NAMES, Renaming(root_there, root_here)):
        if _all_known(names, known, renaming):
            return [renaming]
    fitting: dict[str, Renaming] = {}
    for renaming in _other_renamings(names, known, root_there, root_here):
        if _all_known(names, known, renaming):
            fitting.setdefault(renaming.name_here(names[0]), renaming)  # one for each place in the model
    return list(fitting.values())


def _all_known(names: Iterable[str], known: Collection[str], renaming: Renaming) -> bool:
    return all(renaming.name_here(name) in known for name in names)


def _other_renamings(
    names: Sequence[str], known: Collection[str], root_there: str, root_here: str
) -> Iterator[Renaming]:
    """Other prefixes: all that could go from the file's names, and all modules in which they could lie in the model."""
    shared = _shared_prefixes(names)
    for there in shared:
        yield Renaming(there, "")
        yield Renaming(there, root_here)
    yield from _into_other_modules(names[0], known, "")
    if root_there in shared[1:]:  # not the empty one again
        yield from _into_other_modules(names[0], known, root_there)


def _into_other_modules(first: str, known: Collection[str], there: str) -> Iterator[Renaming]:
    """The prefix of each known name that ends as the first name does after its own prefix ``there``."""
    end = "." + first.removeprefix(f"{there}.")
    for name in known:
        if name.endswith(end):
            yield Renaming(there, name.removesuffix(end))


def _shared_prefixes(names: Sequence[str]) -> list[str]:
    """The prefixes that all names have, the empty one first."""
    owners = [name.split(".")[:-1] for name in names]
    shared = commonprefix(owners)  # noqa: RUF071  # of components, not of letters
    return ["", *accumulate(shared, join)]


# Configurations that name each layer in full


def by_whole_names(layers: Iterable[StoredLayer], settings: LoRAConfig, present: Collection[str]) -> LoRAConfig:
    """Return a configuration that names each layer in full. Each has its own rank and scaling.

    ``present`` has the names of all modules.
    """
    targets = _Targets(use_rslora=settings.use_rslora)
    for layer in layers:
        targets.add(layer)
    target_modules = list_or_expression(targets.modules, present)
    return replace(settings, target_modules=target_modules, exclude_modules=None, **targets.arguments())


@dataclass
class _Targets:
    """The arguments of a configuration that name layers, and the rank and alpha of each name."""

    use_rslora: bool
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    slices: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, Sequence[int]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return all but the modules as arguments: None where none is named."""
        r, *_ = self.ranks.values()
        alpha, *_ = self.alphas.values()
        named = {
            "target_parameters": self.parameters,
            "target_slices": self.slices,
            "trainable_token_indices": self.tokens,
            "rank_pattern": _others_than(r, self.ranks),
            "alpha_pattern": _others_than(alpha, self.alphas),
        }
        given = {argument: value or None for argument, value in named.items()}
        return {**given, "r": r, "alpha": alpha}

    def add(self, layer: StoredLayer) -> None:
        """Name one more layer."""
        if layer.kind == LoRAParameters.__name__:
            for matrix in layer.matrices:
                self._add_parameter(layer, matrix)
            return
        scaling = layer.matrices[0].scale(layer.scaling)
        self._set_numbers(layer.name, layer.r, scaling)
        if layer.tokens:
            self.tokens[layer.name] = layer.tokens
            return
        self.modules.append(layer.name)
        if all(matrix.name for matrix in layer.matrices):
            self.slices[_exactly(layer.name)] = _slices(layer)

    def _add_parameter(self, layer: StoredLayer, matrix: AdaptedMatrix) -> None:
        """Name a parameter of a layer."""
        name = join(layer.name, matrix.weight)
        r = matrix.rank(layer.r)
        scaling = matrix.scale(layer.scaling)
        self._set_numbers(name, r, scaling)
        self.parameters.append(name)

    def _set_numbers(self, name: str, r: int, scaling: float) -> None:
        """Set the rank and alpha of one name. Alpha is as it was given, if that makes the same scaling."""
        growth = r**0.5 if self.use_rslora else r
        alpha = scaling * growth
        rounded = round(alpha, 9)
        self.ranks[name] = r
        self.alphas[name] = rounded if rounded / growth == scaling else alpha


def _others_than(usual: float, numbers: Mapping[str, float]) -> dict[str, float]:
    """A pattern for the names with another number."""
    return {_exactly(name): number for name, number in numbers.items() if number != usual}


def _exactly(name: str) -> str:
    """An expression for one name, and for no other that ends like it."""
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
    """Return a list of names, or an expression if a list would match more. ``present``: the names of all modules."""
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


def renamed_config(config: LoRAConfig, layers: Iterable[StoredLayer], renaming: Renaming, view: View) -> LoRAConfig:
    """Return the configuration of a file for a model with other names."""
    of_the_file = entries_inside(renaming.here, {**view.modules, **view.parameters})
    names = without(of_the_file, [renaming.here])
    saved = [name for name in names if config.is_saved(renaming.name_there(name))]
    renamed_layers = [replace(layer, name=renaming.name_here(layer.name)) for layer in layers]
    settings = replace(config, modules_to_save=saved or None)
    return by_whole_names(renamed_layers, settings, view.modules.keys())

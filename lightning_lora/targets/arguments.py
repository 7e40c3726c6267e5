"""The arguments that name modules or parameters: what each can name, and how it is written in advice.

In this room, ``given`` is an argument as the user wrote it, ``missing`` are its entries that match nothing, and
``could_mean`` are the names that these may have been meant as.
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from lightning_lora.errors import listed
from lightning_lora.targets.matching import ending_in, last_component, matched_whole
from lightning_lora.targets.suggestions import as_end, escaped, similar_names
from lightning_lora.tensors.names import owner_of

if TYPE_CHECKING:
    from lightning_lora.targets.lookup import Names

AUTOMATIC = ("all-linear", "all")  # the keywords that ``target_modules`` accepts, besides regular expressions and lists

_MOST_NAMES = 20  # that are written in place of an expression


class Argument:
    """An argument that is one regular expression, or a list of names of modules."""

    what: ClassVar[str] = "module"  # that its entries name
    wildcard: ClassVar[str] = ".*"  # for a star in a name

    def __init__(self, name: str) -> None:
        self.name = name

    # What it can name

    def candidates(self, names: "Names") -> list[str]:
        """Return the names that its entries are compared with."""
        return list(names.modules)

    def suggested(self, names: "Names") -> list[str]:
        """Return the names that advice may name for it."""
        return self.candidates(names)

    # How it is written

    def written(self, found: list[str]) -> str:
        """Return several names in the form of this argument."""
        return f"a list: {self.name}={found}. In YAML: [{', '.join(found)}]"

    def rewritten(self, given: Sequence[str], expressions: Mapping[str, str], could_mean: Sequence[str]) -> str:
        """Say how to write a list, or keys, some of which were meant as these ``expressions``, by entry."""
        del could_mean  # an expression needs no names
        alternatives = [expressions.get(entry, as_end(escaped(entry))) for entry in given]
        return f'Write one regular expression, and no list: {self.name}=r"{"|".join(alternatives)}".'

    # What is said of its names

    def about_similar(self, names: "Names", missing: Sequence[str], could_mean: Sequence[str]) -> str:
        """Say what the missing entries are similar to, or what can be named."""
        similar = similar_names(missing, could_mean)
        if similar:
            return f"Nearest names: {', '.join(similar)}."
        return self.about_choice(names)

    def about_choice(self, names: "Names") -> str:
        """Say what can be named."""
        last_components = dict.fromkeys(map(last_component, names.adaptable()))
        if not last_components:
            return "It has no layer to adapt."
        return f"Layers that can be adapted end in {listed(last_components, most=8)}."


class _ListOfNames(Argument):
    """An argument that is a list of names, and no expression."""

    wildcard = "[^.]*"

    def rewritten(self, given: Sequence[str], expressions: Mapping[str, str], could_mean: Sequence[str]) -> str:
        """Say which names the expressions match."""
        del given
        matching: dict[str, None] = {}  # each name once
        for expression in expressions.values():
            matching |= dict.fromkeys(matched_whole(expression, could_mean))
        if len(matching) > _MOST_NAMES:
            return "Write names, or their ends."
        return f"Write the names: {self.name}={list(matching)}."


class _Keys(Argument):
    """An argument with a key for each layer: an expression, or a name."""

    def written(self, found: list[str]) -> str:
        return f"a key for each: {', '.join(map(repr, found))}"

    def rewritten(self, given: Sequence[str], expressions: Mapping[str, str], could_mean: Sequence[str]) -> str:
        """Say that each expression can be a key."""
        del given, could_mean
        keys = [f'r"{expression}"' for expression in expressions.values()]
        return f"Write a regular expression as the key: {', '.join(keys)}."


class _TargetModules(Argument):
    """Layers to adapt."""

    def suggested(self, names: "Names") -> list[str]:
        return names.adaptable()

    def about_similar(self, names: "Names", missing: Sequence[str], could_mean: Sequence[str]) -> str:
        """Say also what belongs into another argument, and the word that an entry is similar to."""
        advice = super().about_similar(names, missing, could_mean)
        parameters = ending_in(names.parameters, missing)
        if parameters:
            advice += f" {parameters[0]!r} is a parameter: name it in target_parameters."
        for entry in missing:
            for word in difflib.get_close_matches(entry, AUTOMATIC, n=1):
                return f"{advice} Or did you mean the word {word!r}?"
        return advice


class _TargetParameters(_ListOfNames):
    """Single parameters to adapt."""

    what = "parameter"

    def candidates(self, names: "Names") -> list[str]:
        return list(names.parameters)

    def about_similar(self, names: "Names", missing: Sequence[str], could_mean: Sequence[str]) -> str:
        """Say a parameter of a module that an entry names."""
        modules = set(ending_in(names.modules, missing))
        for parameter in names.parameters:
            if owner_of(parameter) in modules:
                return f"Name parameters, such as {parameter!r}."
        return super().about_similar(names, missing, could_mean)


class _ModulesToSave(_ListOfNames):
    """Modules, or parameters, that train in full."""

    def candidates(self, names: "Names") -> list[str]:
        return [*names.modules, *names.parameters]

    def about_choice(self, names: "Names") -> str:
        outer = [name for name in names.modules if "." not in name]
        return f"Its modules are {listed(outer)}, and those inside."


class _TokenIndices(_Keys):
    """Embeddings of which single rows train."""

    def suggested(self, names: "Names") -> list[str]:
        return names.embeddings()

    def about_choice(self, names: "Names") -> str:
        embeddings = names.embeddings()
        return f"Its embeddings are {listed(embeddings)}." if embeddings else "It has no nn.Embedding."


_ALL: tuple[Argument, ...] = (
    _TargetModules("target_modules"),
    Argument("exclude_modules"),
    _ModulesToSave("modules_to_save"),
    _TargetParameters("target_parameters"),
    _Keys("rank_pattern"),
    _Keys("alpha_pattern"),
    _Keys("target_slices"),
    _TokenIndices("trainable_token_indices"),
)

ARGUMENTS = {argument.name: argument for argument in _ALL}

"""The arguments that name modules or parameters: how each is written, and what is said if an entry matches nothing."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from lightning_lora.errors import TargetError, listed
from lightning_lora.targets.matching import ending_in, last_component, matched_whole
from lightning_lora.targets.suggestions import as_end, escaped, expressions_meant, names_between_commas, similar_names
from lightning_lora.tensors.names import owner_of

if TYPE_CHECKING:
    from lightning_lora.targets.lookup import Names

AUTOMATIC = ("all-linear", "all")  # the keywords that ``target_modules`` accepts, besides regular expressions and lists

SEE_ALL = "print(lightning_lora.summarize(model)) shows every layer"

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

    def to_suggest_from(self, names: "Names") -> list[str]:
        """Return the names that an entry without a match may have been meant as."""
        return self.candidates(names)

    # How it is written

    def written(self, found: list[str]) -> str:
        """Return several names in the form of this argument."""
        return f"a list: {self.name}={found}. In YAML: [{', '.join(found)}]"

    def instead(self, given: Sequence[str], expressions: Mapping[str, str], names: Sequence[str]) -> str:
        """Say what to write instead of the ``given`` entries, some of which were meant as these expressions."""
        alternatives = [expressions.get(entry, as_end(escaped(entry))) for entry in given]
        return f'Write one regular expression, and no list: {self.name}=r"{"|".join(alternatives)}".'

    # What is said of entries that match nothing

    def about_several_names(self, entries: Iterable[str], could_mean: Sequence[str]) -> str:
        """Say how to write several names, if an entry holds them between commas."""
        found = names_between_commas(entries, could_mean)
        if not found:
            return ""
        return f"For several names, write {self.written(found)}."

    def about_expressions(self, given: str | Sequence[str], entries: Iterable[str], could_mean: Sequence[str]) -> str:
        """Say how to write an expression, if an entry is one, or a name with ``*``, or a row of a table.

        ``given`` is the whole argument, of which these entries match nothing.
        """
        expressions = expressions_meant(entries, could_mean, self.wildcard)
        if not expressions:
            return ""
        if isinstance(given, str):
            advice = f'Perhaps write {self.name}=r"{expressions[given]}".'
            about_star = '"*" is no wildcard in an expression; ".*" is. '
        else:
            advice = self.instead(given, expressions, could_mean)
            about_star = '"*" is no wildcard in a name. '
        if "*" in "".join(expressions):
            return about_star + advice
        return advice

    def about_similar(self, names: "Names", entries: list[str], could_mean: list[str]) -> str:
        """Say what the entries are similar to, or what can be named."""
        similar = similar_names(entries, could_mean)
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

    def instead(self, given: Sequence[str], expressions: Mapping[str, str], names: Sequence[str]) -> str:
        matching: dict[str, None] = {}  # each name once
        for expression in expressions.values():
            matching |= dict.fromkeys(matched_whole(expression, names))
        if len(matching) > _MOST_NAMES:
            return "Write names, or their ends."
        return f"Write the names: {self.name}={list(matching)}."


class _Keys(Argument):
    """An argument with a key for each layer: an expression, or a name."""

    def written(self, found: list[str]) -> str:
        return f"a key for each: {', '.join(map(repr, found))}"

    def instead(self, given: Sequence[str], expressions: Mapping[str, str], names: Sequence[str]) -> str:
        keys = [f'r"{expression}"' for expression in expressions.values()]
        return f"Write a regular expression as the key: {', '.join(keys)}."


class _TargetModules(Argument):
    """Layers to adapt."""

    def to_suggest_from(self, names: "Names") -> list[str]:
        return names.adaptable()

    def about_similar(self, names: "Names", entries: list[str], could_mean: list[str]) -> str:
        """Say also what belongs into another argument, and the word that an entry is similar to."""
        advice = super().about_similar(names, entries, could_mean)
        parameters = ending_in(names.parameters, entries)
        if parameters:
            advice += f" {parameters[0]!r} is a parameter: name it in target_parameters."
        for entry in entries:
            for word in difflib.get_close_matches(entry, AUTOMATIC, n=1):
                return f"{advice} Or did you mean the word {word!r}?"
        return advice


class _TargetParameters(_ListOfNames):
    """Single parameters to adapt."""

    what = "parameter"

    def candidates(self, names: "Names") -> list[str]:
        return list(names.parameters)

    def about_similar(self, names: "Names", entries: list[str], could_mean: list[str]) -> str:
        """Say a parameter of a module that an entry names."""
        modules = set(ending_in(names.modules, entries))
        for parameter in names.parameters:
            if owner_of(parameter) in modules:
                return f"Name parameters, such as {parameter!r}."
        return super().about_similar(names, entries, could_mean)


class _ModulesToSave(_ListOfNames):
    """Modules, or parameters, that train in full."""

    def candidates(self, names: "Names") -> list[str]:
        return [*names.modules, *names.parameters]

    def about_choice(self, names: "Names") -> str:
        outer = [name for name in names.modules if "." not in name]
        return f"Its modules are {listed(outer)}, and those inside."


class _TokenIndices(_Keys):
    """Embeddings of which single rows train."""

    def to_suggest_from(self, names: "Names") -> list[str]:
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


def unmatched(
    names: "Names",
    argument: Argument,
    entries: Iterable[str],
    could_mean: Iterable[str],
    *,
    given: str | Sequence[str] = (),
) -> TargetError:
    """Return the error for entries that match nothing, with the names that they could mean.

    ``given`` is the whole pattern, if it is one expression or a list.
    """
    entries = list(dict.fromkeys(entries))
    could_mean = list(dict.fromkeys(could_mean))
    if isinstance(given, str):
        found = f"{argument.name}={given!r} is an expression, and matches no whole name of a {argument.what}"
    else:
        found = f"{argument.name} {entries} match no {argument.what}"
    advice = (
        argument.about_several_names(entries, could_mean)
        or argument.about_expressions(given, entries, could_mean)
        or argument.about_similar(names, entries, could_mean)
    )
    return TargetError(f"{found} of {names.title}. {advice} Correct {argument.name}; {SEE_ALL}.")

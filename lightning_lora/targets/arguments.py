"""The arguments that name modules or parameters: what each can name, and how it is written in advice."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lightning_lora.errors import listed
from lightning_lora.targets.lookup import Lookup
from lightning_lora.targets.matching import ending_in, matched_whole
from lightning_lora.targets.suggestions import as_end, escaped, similar_names
from lightning_lora.tensors.names import last_component, owner_of

# the keywords that ``target_modules`` accepts, besides regular expressions and lists
AUTOMATIC = ("all-linear", "all")

_MOST_NAMES = 20  # that are written in place of an expression


@dataclass(frozen=True)
class UnmatchedEntries:
    """Entries of an argument that match nothing, such as ``["q_porj", "layers.*.v_proj"]``."""

    given: str | Sequence[str]
    """The whole argument as the user wrote it: an expression, or a list.

    It is empty for a pattern, of which only the keys in ``missing`` count.
    """

    missing: Sequence[str]
    """Its entries that match nothing."""

    could_mean: Sequence[str]
    """The names that these may have been meant as."""


class Argument:
    """An argument that is one regular expression, or a list of names of modules.

    Most methods return sentences for the error about entries that match nothing. Their
    docstrings show an example.
    """

    what: ClassVar[str] = "module"  # the word for what its entries name
    wildcard: ClassVar[str] = ".*"  # what advice writes for a star in a name

    def __init__(self, name: str) -> None:
        self.name = name

    # What it can name

    def candidates(self, lookup: Lookup) -> list[str]:
        """Return all names that it accepts."""
        return list(lookup.modules)

    def names_to_suggest(self, lookup: Lookup) -> list[str]:
        """Return the names that advice may propose, which are the useful ones of ``candidates``."""
        return self.candidates(lookup)

    # How it is written

    def how_to_write_several(self, found: list[str]) -> str:
        """Return these names as this argument takes them, as the end of a sentence.

        ``a list: target_modules=['q_proj', 'v_proj']. In YAML: [q_proj, v_proj]``
        """
        return f"a list: {self.name}={found}. In YAML: [{', '.join(found)}]"

    def how_to_write_expressions(
        self, entries: UnmatchedEntries, expressions: Mapping[str, str]
    ) -> str:
        r"""Say how to write entries if some of them were meant as expressions.

        ``expressions`` has these by entry. From the list ``["q_proj",
        "layers.*.v_proj"]``, and ``{"layers.*.v_proj": r"layers\..*\.v_proj"}``, it is:

        ``Write one regular expression, and no list:
        target_modules=r"(.*\.)?q_proj|layers\..*\.v_proj".``
        """
        alternatives = [
            expressions.get(entry, as_end(escaped(entry))) for entry in entries.given
        ]
        return (
            "Write one regular expression, and no list: "
            f'{self.name}=r"{"|".join(alternatives)}".'
        )

    # What is said of its names

    def about_similar_names(self, lookup: Lookup, entries: UnmatchedEntries) -> str:
        """Say which names the entries are similar to, or else which names there are.

        ``Nearest names: 'q_proj' (2 of them, such as 'layers.0.q_proj').``
        """
        similar = similar_names(entries.missing, entries.could_mean)
        if similar:
            return f"Nearest names: {', '.join(similar)}."
        return self.about_what_there_is(lookup)

    def about_what_there_is(self, lookup: Lookup) -> str:
        """Say which names there are, if none is similar.

        ``Layers that can be adapted end in 'q_proj', 'v_proj'.``
        """
        last_components = dict.fromkeys(map(last_component, lookup.adaptable()))
        if not last_components:
            return "It has no layer to adapt."
        return f"Layers that can be adapted end in {listed(last_components, most=8)}."


class _ListOfNames(Argument):
    """An argument that is a list of names, and no expression."""

    wildcard = "[^.]*"

    def how_to_write_expressions(
        self, entries: UnmatchedEntries, expressions: Mapping[str, str]
    ) -> str:
        """Say which names the expressions match, as this argument takes no expression.

        ``Write the names: modules_to_save=['layers.0.norm', 'layers.1.norm'].``
        """
        matching: dict[str, None] = {}  # each name once
        for expression in expressions.values():
            matching |= dict.fromkeys(matched_whole(expression, entries.could_mean))
        if len(matching) > _MOST_NAMES:
            return "Write names, or their ends."
        return f"Write the names: {self.name}={list(matching)}."


class _Keys(Argument):
    """An argument with a key for each layer: an expression, or a name."""

    def how_to_write_several(self, found: list[str]) -> str:
        """Return these names as keys: ``a key for each: 'q_proj', 'v_proj'``."""
        return f"a key for each: {', '.join(map(repr, found))}"

    def how_to_write_expressions(
        self, entries: UnmatchedEntries, expressions: Mapping[str, str]
    ) -> str:
        r"""Say that each expression can be a key.

        ``Write a regular expression as the key: r"layers\..*\.v_proj".``
        """
        keys = [f'r"{expression}"' for expression in expressions.values()]
        return f"Write a regular expression as the key: {', '.join(keys)}."


class _TargetModules(Argument):
    """Layers to adapt."""

    def names_to_suggest(self, lookup: Lookup) -> list[str]:
        return lookup.adaptable()

    def about_similar_names(self, lookup: Lookup, entries: UnmatchedEntries) -> str:
        """Say also that an entry belongs in ``target_parameters``, or is similar to the word "all"."""
        advice = super().about_similar_names(lookup, entries)
        parameters = ending_in(lookup.parameters, entries.missing)
        if parameters:
            advice += (
                f" {parameters[0]!r} is a parameter: name it in target_parameters."
            )
        words: list[str] = []
        for entry in entries.missing:
            words += difflib.get_close_matches(entry, AUTOMATIC, n=1)
        if words:
            advice += f" Or did you mean the word {words[0]!r}?"
        return advice


class _TargetParameters(_ListOfNames):
    """Single parameters to adapt."""

    what = "parameter"

    def candidates(self, lookup: Lookup) -> list[str]:
        return list(lookup.parameters)

    def about_similar_names(self, lookup: Lookup, entries: UnmatchedEntries) -> str:
        """Say which parameter an entry could name, if it names the module that holds it."""
        modules = set(ending_in(lookup.modules, entries.missing))
        for parameter in lookup.parameters:
            if owner_of(parameter) in modules:
                return f"Name parameters, such as {parameter!r}."
        return super().about_similar_names(lookup, entries)


class _ModulesToSave(_ListOfNames):
    """Modules, or parameters, that train in full."""

    def candidates(self, lookup: Lookup) -> list[str]:
        return [*lookup.modules, *lookup.parameters]

    def about_similar_names(self, lookup: Lookup, entries: UnmatchedEntries) -> str:
        """Say also which layer is the last one: it may be the new head."""
        advice = super().about_similar_names(lookup, entries)
        adaptable = lookup.adaptable()
        if not adaptable:
            return advice
        last = adaptable[-1]
        if f"Nearest names: {last!r}" in advice:
            return advice
        return f"{advice} If {last!r}, the last layer, is a new head: modules_to_save={[last]}."

    def about_what_there_is(self, lookup: Lookup) -> str:
        outer = [name for name in lookup.modules if "." not in name]
        return f"Its modules are {listed(outer)}, and those inside."


class _TokenIndices(_Keys):
    """Embeddings of which single rows train."""

    def names_to_suggest(self, lookup: Lookup) -> list[str]:
        return lookup.embeddings()

    def about_what_there_is(self, lookup: Lookup) -> str:
        embeddings = lookup.embeddings()
        return (
            f"Its embeddings are {listed(embeddings)}."
            if embeddings
            else "It has no nn.Embedding."
        )


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

"""A model's layers by name: what a pattern matches, and what is said of one that matches nothing."""

import difflib
import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lightning_lora.errors import TargetError, listed
from lightning_lora.targets.adaptable import why_not
from lightning_lora.targets.meant import several_names, wildcards
from lightning_lora.tensors.names import named_modules, owner_of, parameters_of, plain_module

AUTOMATIC = ("all-linear", "all")  # the keywords that ``target_modules`` accepts, besides regular expressions and lists

OUTPUT_HEAD = "lm_head"  # the name that language models of many packages have for it

SEE_ALL = "print(lightning_lora.summarize(model)) shows every layer"

_MOST_SIMILAR = 5


class Names:
    """The modules and parameters of a model by name. A shared module appears under each of its names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.title = type(model).__name__
        modules = named_modules(model, remove_duplicate=False)
        self.parameters = parameters_of(modules)
        self.modules = {name: module for name, module in modules.items() if name}

    # What matches

    def find(self, argument: str, pattern: object) -> list[str]:
        """Return every name that an argument's pattern matches: an expression for full names, or a list of names."""
        if pattern is None:
            return []
        if isinstance(pattern, str):
            return self._find_by_expression(argument, pattern)
        assert isinstance(pattern, tuple)
        return self._find_by_list(argument, pattern)

    def _find_by_expression(self, argument: str, expression: str) -> list[str]:
        """The names that an expression matches whole."""
        candidates = self._candidates(argument)
        found = [name for name in candidates if re.fullmatch(expression, name)]
        if found:
            return found
        ends = _ends_matching(expression, candidates)
        if ends:
            raise TargetError(
                f"{argument}={expression!r} is an expression, which must match the whole name of a module of "
                f"{self.title}, and matches none. To match ends of names, give a list: {argument}={ends}."
            )
        raise self.unmatched(argument, [expression], self._could_be_meant(argument), given=expression)

    def _find_by_list(self, argument: str, entries: tuple[str, ...]) -> list[str]:
        """The names that are an entry, or end in one."""
        found: list[str] = []
        matched: set[str] = set()
        for name in self._candidates(argument):
            its_entries = set(_ends_of(name)).intersection(entries)
            if its_entries:
                found.append(name)
                matched |= its_entries
        missing = [entry for entry in entries if entry not in matched]
        if missing:
            raise self.unmatched(argument, missing, self._could_be_meant(argument), given=entries)
        return found

    def _candidates(self, argument: str) -> list[str]:
        """The names that an argument's entries are compared with."""
        if argument == "target_parameters":
            return list(self.parameters)
        if argument == "modules_to_save":
            return [*self.modules, *self.parameters]
        return list(self.modules)

    # What there is

    def with_model(self) -> dict[str, nn.Module]:
        """Return the modules and the model itself, whose name is empty."""
        return {"": plain_module(self.model), **self.modules}

    def first_names(self, modules: Collection[nn.Module]) -> dict[str, nn.Module]:
        """Return these modules by the first of their names, in the model's order."""
        first_names: dict[nn.Module, str] = {}
        for name, module in self.modules.items():
            if module in modules:
                first_names.setdefault(module, name)
        return {name: module for module, name in first_names.items()}

    def adaptable(self) -> list[str]:
        """Return the layers that can be adapted."""
        return [name for name, layer in self.modules.items() if why_not(self.modules, name, layer) is None]

    def embeddings(self) -> list[str]:
        """Return the modules of torch's own kind of embedding."""
        return [name for name, module in self.modules.items() if isinstance(module, nn.Embedding)]

    def endings(self, parameters: Collection[str]) -> list[str]:
        """Return a list for ``target_parameters`` that means these: the ends of names, if they mean nothing else."""
        ends = tuple(dict.fromkeys(_last_two(name) for name in parameters))
        means_others = set(self.find("target_parameters", ends)) != set(parameters)
        return list(parameters if means_others else ends)

    # What is said if nothing matches

    def unmatched(
        self, argument: str, entries: Iterable[str], could_mean: Iterable[str], *, given: str | Sequence[str] = ()
    ) -> TargetError:
        """Return the error for entries that match nothing, with the names that they could mean.

        ``given`` is the whole pattern, if it is one expression or a list.
        """
        entries = list(dict.fromkeys(entries))
        could_mean = list(dict.fromkeys(could_mean))
        what = "parameter" if argument == "target_parameters" else "module"
        if isinstance(given, str):
            found = f"{argument}={given!r} is an expression, and matches no whole name of a {what} of {self.title}."
        else:
            found = f"{argument} {entries} match no {what} of {self.title}."
        advice = (
            several_names(argument, entries, could_mean)
            or wildcards(argument, given, entries, could_mean)
            or self._hint(argument, entries, could_mean)
        )
        return TargetError(f"{found} {advice} Correct {argument}; {SEE_ALL}.")

    def _could_be_meant(self, argument: str) -> list[str]:
        """The names that an argument could mean: those that it can adapt."""
        if argument == "target_modules":
            return self.adaptable()
        if argument == "trainable_token_indices":
            return self.embeddings()
        return self._candidates(argument)

    def _hint(self, argument: str, entries: list[str], could_mean: list[str]) -> str:
        """What the entries are similar to, or what the argument can name."""
        similar = _similar_names(entries, could_mean)
        if similar:
            hint = f"Nearest names: {', '.join(similar[:_MOST_SIMILAR])}."
        else:
            hint = self._hint_of_what_there_is(argument)
        if argument == "target_modules":
            return hint + self._hint_of_other_targets(entries)
        if argument == "target_parameters":
            inside = [name for name in self.parameters if _matches_any(owner_of(name), entries)]
            if inside:
                return f"Name parameters, such as {inside[0]!r}."
        return hint

    def _hint_of_what_there_is(self, argument: str) -> str:
        """What the argument can name."""
        if argument == "modules_to_save":
            outer = [name for name in self.modules if "." not in name]
            return f"Its modules are {listed(outer)}, and those inside."
        if argument == "trainable_token_indices":
            embeddings = self.embeddings()
            return f"Its embeddings are {listed(embeddings)}." if embeddings else "It has no nn.Embedding."
        last_components = dict.fromkeys(_last_component(name) for name in self.adaptable())
        if not last_components:
            return "It has no layer to adapt."
        return f"Layers that can be adapted end in {listed(last_components, most=8)}."

    def _hint_of_other_targets(self, entries: list[str]) -> str:
        """What belongs into another argument than ``target_modules``, and the word that an entry is similar to."""
        hint = ""
        parameters = [name for name in self.parameters if _matches_any(name, entries)]
        if parameters:
            hint = f" {parameters[0]!r} is a parameter: name it in target_parameters."
        for entry in entries:
            words = difflib.get_close_matches(entry, AUTOMATIC, n=1)
            if words:
                return f"{hint} Or did you mean the word {words[0]!r}?"
        return hint


# Similar names


def _similar_names(entries: Iterable[str], names: Iterable[str]) -> list[str]:
    """Names, or their ends, that are similar to these entries, each once."""
    names_by_end = _names_by_end(names)
    similar: list[str] = []
    shown: set[str] = set()
    for entry in entries:
        for end in difflib.get_close_matches(entry, names_by_end, n=3, cutoff=0.5):
            names_with_end = names_by_end[end]
            if shown.issuperset(names_with_end):
                continue
            shown.update(names_with_end)
            if len(names_with_end) == 1:
                similar.append(repr(names_with_end[0]))
            else:
                similar.append(f"{end!r} ({len(names_with_end)} of them, such as {names_with_end[0]!r})")
    return similar


def _names_by_end(names: Iterable[str]) -> dict[str, list[str]]:
    """The names by what one may write for them: all of it, or the last component or two."""
    by_end: dict[str, list[str]] = {}
    for name in names:
        for end in {name, _last_two(name), _last_component(name)}:
            by_end.setdefault(end, []).append(name)
    return by_end


# Ends of names


def _ends_of(name: str) -> list[str]:
    """All list entries that would match ``name``: the full name and its ends."""
    ends = [name]
    while "." in ends[-1]:
        ends.append(ends[-1].partition(".")[2])
    return ends


def _ends_matching(expression: str, names: Iterable[str]) -> list[str]:
    """The ends of names that an expression matches whole, each once."""
    matching: dict[str, None] = {}
    for name in names:
        matching |= {end: None for end in _ends_of(name) if re.fullmatch(expression, end)}
    return list(matching)


def _matches_any(name: str, entries: Iterable[str]) -> bool:
    """Whether a name is one of these entries, or ends in one."""
    return not set(_ends_of(name)).isdisjoint(entries)


def _last_component(name: str) -> str:
    return name.rpartition(".")[2]


def _last_two(name: str) -> str:
    """The last two components of a name."""
    return ".".join(name.split(".")[-2:])

"""A model's layers by name: what a pattern matches, and what is said of one that matches nothing."""

import difflib
from collections.abc import Collection, Iterable, Sequence
from typing import ClassVar, TypeVar

from torch import nn

from lightning_lora.errors import TargetError, listed
from lightning_lora.targets.adaptable import why_not
from lightning_lora.targets.meant import matched_whole, several_names, wildcards
from lightning_lora.targets.near_misses import ending_in, ends_of, last_component, last_two, similar_names
from lightning_lora.tensors.named import not_in, of_type, where, with_values, without
from lightning_lora.tensors.names import Modules, first_names, modules_by_all_names, owner_of, parameters_of

Module = TypeVar("Module", bound=nn.Module)

AUTOMATIC = ("all-linear", "all")  # the keywords that ``target_modules`` accepts, besides regular expressions and lists

OUTPUT_HEAD = "lm_head"  # the name that language models of many packages have for it

SEE_ALL = "print(lightning_lora.summarize(model)) shows every layer"


class Names:
    """The modules and parameters of a model by name. A shared module appears under each of its names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.title = type(model).__name__
        self.with_model = modules_by_all_names(model)  # the model itself has an empty name
        self.modules = without(self.with_model, [""])
        self.parameters = parameters_of(self.with_model)

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
        candidates = _argument(argument).candidates(self)
        found = matched_whole(expression, candidates)
        if found:
            return found
        ends = matched_whole(expression, ends_of(candidates))
        if ends:
            raise TargetError(
                f"{argument}={expression!r} is an expression, which must match the whole name of a module of "
                f"{self.title}, and matches none. To match ends of names, give a list: {argument}={ends}."
            )
        raise self.unmatched(argument, [expression], _argument(argument).could_mean(self), given=expression)

    def _find_by_list(self, argument: str, entries: tuple[str, ...]) -> list[str]:
        """The names that are an entry, or end in one."""
        found = ending_in(_argument(argument).candidates(self), entries)
        matched = set(ends_of(found))
        missing = not_in(entries, matched)
        if missing:
            raise self.unmatched(argument, missing, _argument(argument).could_mean(self), given=entries)
        return found

    # What there is

    def first_names(self, modules: Collection[nn.Module]) -> dict[str, nn.Module]:
        """Return these modules by the first of their names, in the model's order."""
        return first_names(with_values(self.modules, modules))

    def adaptable(self) -> list[str]:
        """Return the layers that can be adapted."""
        return list(without(self.modules, self.refused(self.modules)))

    def refused(self, layers: Modules) -> dict[str, str]:
        """Return why some of these layers cannot be adapted."""
        reasons = {name: why_not(self.modules, name, layer) for name, layer in layers.items()}
        return where(reasons, bool)

    def of_type(self, kind: type[Module]) -> dict[str, Module]:
        """Return the modules of a class, and of its subclasses."""
        return of_type(self.modules, kind)

    def embeddings(self) -> list[str]:
        """Return the modules of torch's own kind of embedding."""
        return list(self.of_type(nn.Embedding))

    def endings(self, parameters: Collection[str]) -> list[str]:
        """Return a list for ``target_parameters`` that means these: the ends of names, if they mean nothing else."""
        ends = tuple(dict.fromkeys(map(last_two, parameters)))
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
        what = _argument(argument).what
        if isinstance(given, str):
            found = f"{argument}={given!r} is an expression, and matches no whole name of a {what} of {self.title}."
        else:
            found = f"{argument} {entries} match no {what} of {self.title}."
        advice = (
            several_names(argument, entries, could_mean)
            or wildcards(argument, given, entries, could_mean)
            or _argument(argument).advice(self, entries, could_mean)
        )
        return TargetError(f"{found} {advice} Correct {argument}; {SEE_ALL}.")


# The arguments that name modules or parameters


class _Argument:
    """What the entries of an argument mean, and what is said if they match nothing."""

    what: ClassVar[str] = "module"  # that its entries name

    def candidates(self, names: Names) -> list[str]:
        """Return the names that its entries are compared with."""
        return list(names.modules)

    def could_mean(self, names: Names) -> list[str]:
        """Return the names that it could mean: those that it can adapt."""
        return self.candidates(names)

    def advice(self, names: Names, entries: list[str], could_mean: list[str]) -> str:
        """Return what the entries are similar to, or what it can name."""
        similar = similar_names(entries, could_mean)
        if similar:
            return f"Nearest names: {', '.join(similar)}."
        return self.about_choice(names)

    def about_choice(self, names: Names) -> str:
        """Return what it can name."""
        last_components = dict.fromkeys(map(last_component, names.adaptable()))
        if not last_components:
            return "It has no layer to adapt."
        return f"Layers that can be adapted end in {listed(last_components, most=8)}."


class _TargetModules(_Argument):
    def could_mean(self, names: Names) -> list[str]:
        return names.adaptable()

    def advice(self, names: Names, entries: list[str], could_mean: list[str]) -> str:
        """Return also what belongs into another argument, and the word that an entry is similar to."""
        advice = super().advice(names, entries, could_mean)
        parameters = ending_in(names.parameters, entries)
        if parameters:
            advice += f" {parameters[0]!r} is a parameter: name it in target_parameters."
        for entry in entries:
            for word in difflib.get_close_matches(entry, AUTOMATIC, n=1):
                return f"{advice} Or did you mean the word {word!r}?"
        return advice


class _TargetParameters(_Argument):
    what = "parameter"

    def candidates(self, names: Names) -> list[str]:
        return list(names.parameters)

    def advice(self, names: Names, entries: list[str], could_mean: list[str]) -> str:
        """Return a parameter of a module that an entry names."""
        modules = set(ending_in(names.modules, entries))
        for parameter in names.parameters:
            if owner_of(parameter) in modules:
                return f"Name parameters, such as {parameter!r}."
        return super().advice(names, entries, could_mean)


class _ModulesToSave(_Argument):
    def candidates(self, names: Names) -> list[str]:
        return [*names.modules, *names.parameters]

    def about_choice(self, names: Names) -> str:
        outer = [name for name in names.modules if "." not in name]
        return f"Its modules are {listed(outer)}, and those inside."


class _TokenIndices(_Argument):
    def could_mean(self, names: Names) -> list[str]:
        return names.embeddings()

    def about_choice(self, names: Names) -> str:
        embeddings = names.embeddings()
        return f"Its embeddings are {listed(embeddings)}." if embeddings else "It has no nn.Embedding."


_ARGUMENTS: dict[str, _Argument] = {
    "target_modules": _TargetModules(),
    "target_parameters": _TargetParameters(),
    "modules_to_save": _ModulesToSave(),
    "trainable_token_indices": _TokenIndices(),
}
_OTHER_ARGUMENT = _Argument()


def _argument(name: str) -> _Argument:
    return _ARGUMENTS.get(name, _OTHER_ARGUMENT)

"""A model's modules and parameters by name, and those that a pattern matches."""

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from lightning_lora.errors import TargetError
from lightning_lora.targets.adaptable import why_not
from lightning_lora.targets.arguments import ARGUMENTS, unmatched
from lightning_lora.targets.matching import ending_in, ends_of, last_two, matched_whole
from lightning_lora.tensors.dicts import of_type, where, with_values, without
from lightning_lora.tensors.names import Modules, direct_parameters, first_names, modules_by_all_names, names_not_in

Module = TypeVar("Module", bound=nn.Module)

OUTPUT_HEAD = "lm_head"  # the name that language models of many packages have for it


class Names:
    """The modules and parameters of a model by name. A shared module appears under each of its names."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.title = type(model).__name__
        self.all_modules = modules_by_all_names(model)  # with the model itself, whose name is empty
        self.modules = without(self.all_modules, [""])
        self.parameters = direct_parameters(self.all_modules)

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
        about = ARGUMENTS[argument]
        candidates = about.candidates(self)
        found = matched_whole(expression, candidates)
        if found:
            return found
        ends = matched_whole(expression, ends_of(candidates))
        if ends:
            raise TargetError(
                f"{argument}={expression!r} is an expression, which must match the whole name of a module of "
                f"{self.title}, and matches none. To match ends of names, give a list: {argument}={ends}."
            )
        raise unmatched(self, about, [expression], about.to_suggest_from(self), given=expression)

    def _find_by_list(self, argument: str, entries: tuple[str, ...]) -> list[str]:
        """The names that are an entry, or end in one."""
        about = ARGUMENTS[argument]
        found = ending_in(about.candidates(self), entries)
        matched = set(ends_of(found))
        missing = names_not_in(entries, matched)
        if missing:
            raise unmatched(self, about, missing, about.to_suggest_from(self), given=entries)
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

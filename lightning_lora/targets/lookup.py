"""A model's modules and parameters by name, and those that a pattern matches."""

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from lightning_lora.errors import TargetError
from lightning_lora.targets.adaptable import why_not_adaptable
from lightning_lora.targets.arguments import ARGUMENTS
from lightning_lora.targets.matching import ending_in, ends_of, last_two, matched_whole
from lightning_lora.targets.unmatched import unmatched
from lightning_lora.tensors.dicts import of_type, where, with_values, without
from lightning_lora.tensors.names import (
    Modules,
    direct_parameters,
    first_names,
    modules_by_all_names,
    names_not_in,
)

Module = TypeVar("Module", bound=nn.Module)

OUTPUT_HEAD = "lm_head"  # the name that language models of many packages have for it


class Lookup:
    """The modules and parameters of a model by name.

    A shared module appears under each of its names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.title = type(model).__name__
        # with the model itself, whose name is empty
        self.all_modules = modules_by_all_names(model)
        self.modules = without(self.all_modules, [""])
        self.parameters = direct_parameters(self.all_modules)

    # What matches

    def find(self, argument_name: str, pattern: object) -> list[str]:
        """Return every name that an argument's pattern matches: an expression for full names, or a list of names."""
        if pattern is None:
            return []
        if isinstance(pattern, str):
            return self._find_by_expression(argument_name, pattern)
        assert isinstance(pattern, tuple)
        return self._find_by_list(argument_name, pattern)

    def _find_by_expression(self, argument_name: str, expression: str) -> list[str]:
        """The names that an expression matches whole."""
        argument = ARGUMENTS[argument_name]
        candidates = argument.candidates(self)
        found = matched_whole(expression, candidates)
        if found:
            return found
        ends = matched_whole(expression, ends_of(candidates))
        if ends:
            raise TargetError(
                f"{argument_name}={expression!r} is an expression, which must match "
                f"the whole name of a module of {self.title}, and matches none. To "
                f"match ends of names, give a list: {argument_name}={ends}."
            )
        raise unmatched(
            self, argument, [expression], argument.suggested(self), given=expression
        )

    def _find_by_list(self, argument_name: str, entries: tuple[str, ...]) -> list[str]:
        """The names that are an entry, or end in one."""
        argument = ARGUMENTS[argument_name]
        found = ending_in(argument.candidates(self), entries)
        matched = set(ends_of(found))
        missing = names_not_in(entries, matched)
        if missing:
            raise unmatched(
                self, argument, missing, argument.suggested(self), given=entries
            )
        return found

    # What there is

    def first_names(self, modules: Collection[nn.Module]) -> dict[str, nn.Module]:
        """Return these modules by the first of their names, in the model's order."""
        return first_names(with_values(self.modules, modules))

    def first_name_of(self, module: nn.Module) -> str:
        """Return the first name of a module, which must be there."""
        (name,) = self.first_names({module})
        return name

    def adaptable(self) -> list[str]:
        """Return the layers that can be adapted."""
        return list(without(self.modules, self.refused(self.modules)))

    def refused(self, layers: Modules) -> dict[str, str]:
        """Return why some of these layers cannot be adapted."""
        reasons = {
            name: why_not_adaptable(self.modules, name, layer)
            for name, layer in layers.items()
        }
        return where(reasons, bool)

    def of_type(self, kind: type[Module]) -> dict[str, Module]:
        """Return the modules of a class, and of its subclasses."""
        return of_type(self.modules, kind)

    def embeddings(self) -> list[str]:
        """Return the modules of torch's own kind of embedding."""
        return list(self.of_type(nn.Embedding))

    def as_target_parameters(self, parameters: Collection[str]) -> list[str]:
        """Return these parameters as a list for that argument: ends of their names, if these mean nothing else."""
        ends = tuple(dict.fromkeys(map(last_two, parameters)))
        means_others = set(self.find("target_parameters", ends)) != set(parameters)
        return list(parameters if means_others else ends)

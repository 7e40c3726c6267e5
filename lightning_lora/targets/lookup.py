"""A model's modules and parameters by name, and which of them can be adapted."""

from collections.abc import Collection
from typing import TypeVar

from torch import nn

from lightning_lora.targets.adaptable import why_not_adaptable
from lightning_lora.tensors.dicts import of_type, where, with_values, without
from lightning_lora.tensors.names import (
    Modules,
    direct_parameters,
    first_names,
    modules_by_all_names,
)

Module = TypeVar("Module", bound=nn.Module)

OUTPUT_HEAD = "lm_head"  # the name that language models of many packages have for it


class Lookup:
    """The modules and parameters of a model by name.

    A shared module appears under each of its names.
    """

    def __init__(self, model: nn.Module) -> None:
        self.title = type(model).__name__
        # with the model itself, whose name is empty
        self.all_modules = modules_by_all_names(model)
        self.modules = without(self.all_modules, [""])
        self.parameters = direct_parameters(self.all_modules)

    def first_names(self, modules: Collection[nn.Module]) -> dict[str, nn.Module]:
        """Return these modules by the first of their names, in the model's order."""
        return first_names(with_values(self.modules, modules))

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

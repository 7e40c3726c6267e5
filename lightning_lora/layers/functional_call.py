"""Run a layer on other weights, as ``torch.func.functional_call`` does, but without changing it meanwhile."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn


@dataclass
class Attributes:
    """The attributes of a module, and of its copy before and after it ran."""

    of_module: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]  # those of the copy itself

    def copy_back(self, derived: Collection[str]) -> None:
        """Set on the module what forward has set on the copy, but for the ``derived`` ones."""
        for name, value in self.after.items():
            if name not in derived and not self._is_as_before(name, value):
                self.of_module[name] = value

    def _is_as_before(self, name: str, value: object) -> bool:
        return name in self.before and self.before[name] is value


def functional_call(
    module: nn.Module,
    cls: Any,
    weights: Mapping[str, Tensor | None],
    derived: Collection[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the forward of ``cls`` on a copy of ``module`` with other weights. Modules inside it may hold some of them.

    ``module`` itself does not change meanwhile, so other threads may run it too. Attributes that forward sets are
    copied back at the end, but for those in ``derived``, which it sets from the weights.
    """
    copied: list[Attributes] = []
    copy = _with_weights(module, cls, weights, copied)
    output = cls.forward(copy, *args, **kwargs)  # not the instance's, where other code may wrap that of ``module``
    for attributes in copied:
        attributes.copy_back(derived)
    return output


def _with_weights(module: nn.Module, cls: type, weights: Mapping[str, Tensor | None], copied: list[Attributes]) -> Any:
    """A copy that shares everything with ``module`` except some weights. ``copied`` notes what each copy has."""
    copy: Any = object.__new__(cls)
    attributes = vars(copy)
    attributes.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            attributes[name] = MethodType(value.__func__, copy)
    inner_weights: dict[str, dict[str, Tensor | None]] = {}  # by the module inside that holds them
    for name, weight in weights.items():
        child, _, inner_name = name.partition(".")
        if inner_name:
            inner_weights.setdefault(child, {})[inner_name] = weight
        else:
            attributes[name] = weight  # instance attributes come before parameters
    for child, its_weights in inner_weights.items():
        inner = module.get_submodule(child)
        inner_copy = _with_weights(inner, type(inner), its_weights, copied)
        attributes["_modules"] = {**attributes["_modules"], child: inner_copy}
    copied.append(Attributes(of_module=module.__dict__, before=dict(attributes), after=attributes))
    return copy

"""Run a layer on other weights, as ``torch.func.functional_call`` does, but without changing it meanwhile."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn


@dataclass
class _Copied:
    """A module, and the copy of it that runs."""

    module: nn.Module
    copy: Any
    attributes_before: dict[str, Any]  # those of the copy, before it runs

    def copy_back(self, derived: Collection[str]) -> None:
        """Set on the module what forward has set on the copy, but for the ``derived`` attributes."""
        attributes = vars(self.module)
        for name, value in vars(self.copy).items():
            if name not in derived and not self._is_as_before(name, value):
                attributes[name] = value

    def _is_as_before(self, name: str, value: object) -> bool:
        before = self.attributes_before
        return name in before and before[name] is value


def functional_call(
    module: nn.Module,
    cls: Any,
    weights: Mapping[str, Tensor | None],
    derived: Collection[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the forward of ``cls`` on a copy of ``module`` with other weights.

    Modules inside it may hold some of them. ``module`` itself does not change
    meanwhile, so other threads may run it too. Attributes that forward sets are copied
    back at the end, but for those in ``derived``, which it sets from the weights.
    """
    copied: list[_Copied] = []
    copy = _with_weights(module, cls, weights, copied)
    # not the instance's, where other code may wrap that of ``module``
    output = cls.forward(copy, *args, **kwargs)
    for each in copied:
        each.copy_back(derived)
    return output


def _with_weights(
    module: nn.Module,
    cls: type,
    weights: Mapping[str, Tensor | None],
    copied: list[_Copied],
) -> Any:
    """A copy that shares everything with ``module`` but some weights.

    ``copied`` gets it, and copies inside it.
    """
    copy: Any = object.__new__(cls)
    attributes = vars(copy)
    attributes.update(vars(module))
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            attributes[name] = MethodType(value.__func__, copy)
    # by the child that holds them: "out_proj" -> "weight"
    weights_inside: dict[str, dict[str, Tensor | None]] = {}
    for name, weight in weights.items():
        child, _, name_in_child = name.partition(".")
        if name_in_child:
            weights_inside.setdefault(child, {})[name_in_child] = weight
        else:
            attributes[name] = weight  # instance attributes come before parameters
    for child, its_weights in weights_inside.items():
        inner = module.get_submodule(child)
        inner_copy = _with_weights(inner, type(inner), its_weights, copied)
        attributes["_modules"] = {**attributes["_modules"], child: inner_copy}
    copied.append(_Copied(module, copy, attributes_before=dict(attributes)))
    return copy

"""Run a layer with other weights or attributes, as ``torch.func.functional_call`` does.

The layer itself does not change meanwhile.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn


@dataclass
class _Copied:
    """A module, and the copy of it that runs."""

    module: nn.Module
    copy: Any
    attributes_before: dict[str, Any]  # those of the copy, before it runs
    inside: list["_Copied"]  # the modules inside that are copied too

    def copy_back(self, derived: Collection[str]) -> None:
        """Set on the module what forward has set on the copy, but for the ``derived`` attributes."""
        attributes = vars(self.module)
        for name, value in vars(self.copy).items():
            if name not in derived and not self._is_as_before(name, value):
                attributes[name] = value
        for inner in self.inside:
            inner.copy_back(derived)

    def _is_as_before(self, name: str, value: object) -> bool:
        before = self.attributes_before
        return name in before and before[name] is value


def functional_call(
    module: nn.Module,
    cls: Any,
    attributes: Mapping[str, Any],
    derived: Collection[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Run the forward of ``cls`` on a copy of ``module`` with other attributes.

    Most are weights, but any attribute can be given. A name with a dot, such as
    ``out_proj.weight``, is that of a module inside. ``module`` itself does not change
    meanwhile, so other threads may run it too. Attributes that forward sets are copied
    back at the end, but for those in ``derived``, which it sets from the weights.
    """
    copied = _copied(module, cls, attributes)
    # the forward of the class, as one on the instance may be a wrapper of other code
    output = cls.forward(copied.copy, *args, **kwargs)
    copied.copy_back(derived)
    return output


def _copied(module: nn.Module, cls: type, given: Mapping[str, Any]) -> _Copied:
    """A copy that shares everything with ``module`` but the given attributes.

    It has the same dicts of parameters and buffers, so a buffer that forward sets is set
    on ``module`` at once. The other attributes are its own.
    """
    copy: Any = object.__new__(cls)
    own, given_inside = _by_child(given)
    attributes = vars(copy)
    attributes.update(vars(module))
    attributes.update(_methods_set_on(module, copy))
    attributes.update(own)  # Python finds these before it looks among the parameters
    inside: list[_Copied] = []
    for child, given_to_child in given_inside.items():
        inner = module.get_submodule(child)
        copied_child = _copied(inner, type(inner), given_to_child)
        inside.append(copied_child)
        # a new dict: the module itself keeps its child
        attributes["_modules"] = {**attributes["_modules"], child: copied_child.copy}
    return _Copied(module, copy, dict(attributes), inside)


def _methods_set_on(module: nn.Module, copy: object) -> dict[str, MethodType]:
    """The methods that are set on the module itself, so that they run on the copy."""
    methods: dict[str, MethodType] = {}
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:
            methods[name] = MethodType(value.__func__, copy)
    return methods


def _by_child(
    given: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split attributes into those of a module itself, and those of modules inside, by the names of these.

    ``{"weight": w, "out_proj.weight": v}`` gives ``{"weight": w}`` and ``{"out_proj":
    {"weight": v}}``.
    """
    own: dict[str, Any] = {}
    inside: dict[str, dict[str, Any]] = {}
    for name, value in given.items():
        child, _, name_in_child = name.partition(".")
        if name_in_child:
            inside.setdefault(child, {})[name_in_child] = value
        else:
            own[name] = value
    return own, inside

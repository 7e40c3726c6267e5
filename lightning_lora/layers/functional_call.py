"""Run a layer on other weights, as ``torch.func.functional_call`` does, but without changing it meanwhile."""

from collections.abc import Collection, Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

Made = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""The attributes of a module, of its copy before forward, and of the copy now."""


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
    made: list[Made] = []
    copy = _with_weights(module, cls, weights, made)
    output = cls.forward(copy, *args, **kwargs)  # not the instance's, where other code may wrap that of ``module``
    for attributes, before, after in made:
        for name, value in after.items():
            if name not in derived and (name not in before or before[name] is not value):
                attributes[name] = value
    return output


def _with_weights(module: nn.Module, cls: type, weights: Mapping[str, Tensor | None], made: list[Made]) -> Any:
    """A copy that shares everything with ``module`` except some weights. ``made`` collects all copies."""
    copy: Any = object.__new__(cls)
    attributes = vars(copy)
    attributes.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            attributes[name] = MethodType(value.__func__, copy)
    inside: dict[str, dict[str, Tensor | None]] = {}
    for name, weight in weights.items():
        child, _, leaf = name.partition(".")
        if leaf:
            inside.setdefault(child, {})[leaf] = weight
        else:
            attributes[name] = weight  # instance attributes come before parameters
    if inside:
        attributes["_modules"] = dict(module._modules)
    for name, given in inside.items():
        child_module = module.get_submodule(name)
        attributes["_modules"][name] = _with_weights(child_module, type(child_module), given, made)
    made.append((module.__dict__, dict(attributes), attributes))
    return copy

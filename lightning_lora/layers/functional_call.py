"""Run a layer on other weights, without changing it."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import Tensor, nn

Made = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""The attributes of a module, of its twin at the start, and of the twin now."""


def run_on(
    module: nn.Module, cls: type, values: Mapping[str, Tensor | None], own: tuple[str, ...], *args: Any, **kwargs: Any
) -> Any:
    """Run a module's forward with other weights.

    The forward runs on a twin: a temporary copy that shares all attributes except the weights. ``module`` itself does
    not change during the call, so other threads may run it too. Attributes that forward sets on the twin are copied
    back at the end.

    Args:
        module: Any module.
        cls: The class of the twin.
        values: The weights by name. A name may be that of a weight in a module inside.
        own: Attributes that forward sets from the weights. They are not copied back.
        *args: Arguments of forward.
        **kwargs: Keyword arguments of forward.
    """
    made: list[Made] = []
    output = _twin_of(module, cls, values, made).forward(*args, **kwargs)
    for attributes, before, after in made:  # a forward may set attributes: keep them
        changed = {name: value for name, value in after.items() if name not in before or before[name] is not value}
        attributes.update({name: value for name, value in changed.items() if name not in own})
    return output


def _twin_of(module: nn.Module, cls: type, values: Mapping[str, Tensor | None], made: list[Made]) -> Any:
    """Create an object that shares everything with ``module`` except some weights.

    Args:
        module: Any module.
        cls: The class of the twin.
        values: Its weights by name.
        made: Collects every twin, so the caller can copy attributes back.
    """
    twin: Any = object.__new__(cls)
    state = vars(twin)
    state.update(module.__dict__)
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:
            state[name] = MethodType(value.__func__, twin)
    inner: dict[str, dict[str, Tensor | None]] = {}
    for name, value in values.items():
        child, _, leaf = name.partition(".")
        if leaf:
            inner.setdefault(child, {})[leaf] = value
        else:
            state[name] = value  # instance attributes come before parameters
    if inner:
        twins = {}
        for name, weights in inner.items():
            child_module = module.get_submodule(name)
            twins[name] = _twin_of(child_module, type(child_module), weights, made)
        state["_modules"] = {**module._modules, **twins}
    made.append((module.__dict__, dict(state), state))
    return twin

"""Compiled code: it would be compiled once more for the first batch, so nothing is watched there."""

import sys
from collections.abc import Iterable
from types import FunctionType
from typing import Any

from torch import nn

from lightning_lora import private
from lightning_lora.tensors.named import where

_PACKAGES_WITHOUT = {"torch", "builtins", "lightning", "pytorch_lightning", "lightning_lora"}


def is_compiled(model: nn.Module) -> bool:
    """Return whether code of a model is compiled: a module, an attribute, or a function beside a module's class."""
    modules = list(model.modules())
    if any(_holds_compiled_code(module) for module in modules):
        return True
    classes = _classes_of(modules)
    names_of_files = {cls.__module__ for cls in classes}
    files = [sys.modules[name] for name in names_of_files if name in sys.modules]
    return any(_defines_compiled_code(each) for each in (*classes, *files))


def _holds_compiled_code(module: nn.Module) -> bool:
    """Whether a module is compiled, or one of its attributes."""
    attributes = vars(module)
    if private.COMPILED in module._modules or attributes.get(private.COMPILED_CALL) is not None:
        return True
    return bool(where(attributes, _is_compiled_function))


def _classes_of(modules: Iterable[nn.Module]) -> set[type]:
    """The classes of these modules, without those of torch and Lightning."""
    classes: set[type] = set()
    for module in modules:
        for cls in type(module).__mro__:
            if cls.__module__.partition(".")[0] not in _PACKAGES_WITHOUT:
                classes.add(cls)
    return classes


def _defines_compiled_code(place: Any) -> bool:
    """Whether a class or a file defines a compiled function."""
    compiled = where(dict(vars(place)), _is_compiled_function)
    return not all(name.startswith(private.COMPILED_RESULT) for name in compiled)


def _is_compiled_function(value: object) -> bool:
    return isinstance(value, FunctionType) and hasattr(value, private.COMPILED_FUNCTION)

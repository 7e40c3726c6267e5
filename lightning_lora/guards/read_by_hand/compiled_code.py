"""Compiled code: it would be compiled once more for the first batch, so nothing is watched there."""

import sys
from types import FunctionType

from torch import nn

from lightning_lora import private
from lightning_lora.tensors.dicts import where

_SKIPPED_PACKAGES = {
    "torch",
    "builtins",
    "lightning",
    "pytorch_lightning",
    "lightning_lora",
}
"""Functions in the files of these packages are not the model's own code."""


def is_compiled(model: nn.Module) -> bool:
    """Return whether code of a model is compiled: a module, an attribute, or a function beside a module's class."""
    classes: set[type] = set()
    for module in model.modules():
        if _holds_compiled_code(module):
            return True
        classes.update(type(module).__mro__)
    return any(map(_defines_compiled_code, classes))


def _holds_compiled_code(module: nn.Module) -> bool:
    """Whether a module is compiled, or one of its attributes."""
    attributes = vars(module)
    return (
        private.COMPILED in module._modules
        or attributes.get(private.COMPILED_CALL) is not None
        or any(map(_is_compiled_function, attributes.values()))
    )


def _defines_compiled_code(cls: type) -> bool:
    """Whether a class defines a compiled function, or the file around it.

    Classes of ``_SKIPPED_PACKAGES`` are not looked at.
    """
    package, *_ = cls.__module__.split(".")
    if package in _SKIPPED_PACKAGES:
        return False
    file = sys.modules.get(cls.__module__, cls)  # some classes are made without one
    compiled = [
        *where(vars(cls), _is_compiled_function),
        *where(dict(vars(file)), _is_compiled_function),
    ]
    return not all(map(_is_result, compiled))


def _is_result(name: str) -> bool:
    """Whether torch has put a function into a file itself: the result of a compilation."""
    return name.startswith(private.COMPILED_RESULT)


def _is_compiled_function(value: object) -> bool:
    return isinstance(value, FunctionType) and hasattr(value, private.COMPILED_FUNCTION)

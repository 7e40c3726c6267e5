"""Precision plugins that replace layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.plugins import Precision

from lightning_lora.model.changes.attach import reattach_to_replaced
from lightning_lora.model.view import View


@contextmanager
def keeping_adapters(precision: Precision) -> Iterator[None]:
    """Move adapters to the layers with which ``precision`` replaces theirs, as BitsandbytesPrecision does."""
    convert = precision.convert_module

    def convert_module(module: Any) -> Any:
        before = View(module).layers
        converted = convert(module)
        reattach_to_replaced(converted, before)
        return converted

    precision.convert_module = convert_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        del precision.convert_module

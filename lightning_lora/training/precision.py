"""Keep adapters when a precision plugin replaces layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning_lora.model.attach import move_adapters
from lightning_lora.model.view import View

if TYPE_CHECKING:
    from lightning.pytorch.plugins import Precision


@contextmanager
def keeping_adapters(precision: "Precision") -> Iterator[None]:
    """Keep adapters when ``precision`` replaces their layers.

    They move to the new layers. For example, BitsandbytesPrecision replaces layers.
    """
    own, known = precision.convert_module, vars(precision).copy()

    def convert_module(module: Any) -> Any:
        before = View(module).layers
        converted = own(module)
        move_adapters(converted, before)
        return converted

    precision.convert_module = convert_module  # type: ignore[method-assign]
    try:
        yield
    finally:
        if "convert_module" in known:
            precision.convert_module = own  # type: ignore[method-assign]
        else:
            del precision.convert_module

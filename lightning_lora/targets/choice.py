"""The adapter selected for one layer."""

from dataclasses import dataclass

from torch import nn

from lightning_lora.layers import LoRALayer, Part, Settings


@dataclass(frozen=True)
class Choice:
    """A layer to adapt, and the adapter to use.

    Args:
        layer: The layer.
        kind: The adapter class.
        parts: The matrices to adapt.
        settings: The adapter's settings.
    """

    layer: nn.Module
    kind: type[LoRALayer]
    parts: tuple[Part, ...]
    settings: Settings

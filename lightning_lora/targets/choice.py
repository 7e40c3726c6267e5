"""The adapter selected for one layer."""

from dataclasses import dataclass

from torch import nn

from lightning_lora.layers import AdaptedMatrix, LoRALayer, Settings


@dataclass(frozen=True)
class Choice:
    """A layer to adapt, and the adapter to use.

    Args:
        layer: The layer.
        kind: The adapter class.
        matrices: The matrices to adapt.
        settings: The adapter's settings.
    """

    layer: nn.Module
    kind: type[LoRALayer]
    matrices: tuple[AdaptedMatrix, ...]
    settings: Settings

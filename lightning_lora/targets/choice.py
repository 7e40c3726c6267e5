"""What is chosen for one layer."""

from dataclasses import dataclass

from torch import nn

from lightning_lora.layers import LoRALayer, Part, Settings


@dataclass(frozen=True)
class Choice:
    """A layer to adapt, and how.

    Args:
        layer: The layer.
        kind: The class of its adapter.
        parts: The matrices in it.
        settings: The adapter's settings.
    """

    layer: nn.Module
    kind: type[LoRALayer]
    parts: tuple[Part, ...]
    settings: Settings

"""The layer types that can be adapted: one file each, and one entry in ``ADAPTERS``."""

from torch import nn

from lightning_lora.layers.attention import LoRAAttention
from lightning_lora.layers.base import LoRALayer, attach
from lightning_lora.layers.bilinear import LoRABilinear
from lightning_lora.layers.conv1d import LoRAConv1D
from lightning_lora.layers.convolution import LoRAConvNd, LoRAConvTransposeNd
from lightning_lora.layers.embedding import LoRAEmbedding, LoRAEmbeddingBag
from lightning_lora.layers.experts import LoRAParameters
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.parts import FROM_BASE, Adapter, Part, Settings
from lightning_lora.layers.quantized import LoRALinear4bit, LoRALinear8bit, count, quantised_entries, repacks, unpack
from lightning_lora.layers.recurrent import LoRARecurrent
from lightning_lora.layers.start import new_adapter

ADAPTERS: dict[type[nn.Module] | str, type[LoRALayer]] = {
    layer_type: adapter
    for adapter in (
        LoRALinear,
        LoRALinear4bit,
        LoRALinear8bit,
        LoRAConv1D,
        LoRAEmbedding,
        LoRAEmbeddingBag,
        LoRAConvNd,
        LoRAConvTransposeNd,
        LoRAAttention,
        LoRARecurrent,
        LoRABilinear,
    )
    for layer_type in adapter.lora_layer_types
}
"""Layer type (or its full name, where its package is optional) to the adapter for it and its subclasses."""


def adapter_for(layer: nn.Module) -> type[LoRALayer] | None:
    """Return the adapter for ``layer``'s type or the nearest of its bases, or None.

    Example:
        >>> adapter_for(nn.Linear(2, 2)).__name__
        'LoRALinear'
        >>> adapter_for(nn.ReLU()) is None
        True
    """
    for base in type(layer).__mro__:
        adapter = ADAPTERS.get(base) or ADAPTERS.get(f"{base.__module__}.{base.__qualname__}")
        if adapter is not None:
            return adapter
    return None


__all__ = [
    "ADAPTERS",
    "FROM_BASE",
    "Adapter",
    "LoRALayer",
    "LoRAParameters",
    "Part",
    "Settings",
    "adapter_for",
    "attach",
    "count",
    "new_adapter",
    "quantised_entries",
    "repacks",
    "unpack",
]

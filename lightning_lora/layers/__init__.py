"""The layer types that can be adapted: one file each, and one line in ``ADAPTERS``."""

from torch import nn

from lightning_lora.layers.base import Adapter, LoRALayer, attach, new_adapter
from lightning_lora.layers.conv1d import LoRAConv1D
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRALinear

ADAPTERS: dict[type[nn.Module] | str, type[LoRALayer]] = {
    adapter.lora_layer_type: adapter for adapter in (LoRALinear, LoRAConv1D, LoRAEmbedding)
}
"""Layer type (or its full name, where its package is optional) to the adapter for it and its subclasses."""

LINEAR_LIKE: tuple[type[LoRALayer], ...] = (LoRALinear, LoRAConv1D)
"""The adapters of layers that ``"all-linear"`` means."""


def adapter_for(layer: nn.Module) -> type[LoRALayer] | None:
    """Return the adapter for ``layer``'s type or the nearest of its bases, or None.

    Example:
        >>> adapter_for(nn.Linear(2, 2)).__name__
        'LoRALinear'
        >>> adapter_for(nn.ReLU()) is None
        True
    """
    return next(
        (adapter for base in type(layer).__mro__ for adapter in ADAPTERS.values() if adapter.lora_adapts(base)), None
    )


__all__ = ["ADAPTERS", "LINEAR_LIKE", "Adapter", "LoRALayer", "adapter_for", "attach", "new_adapter"]

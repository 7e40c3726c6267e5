"""Let layers keep packed copies of their frozen weights."""

from lightning_lora.functional.packing import PackedWeight
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.tensors.shards import is_spread


def set_packing(view: View, allowed: bool) -> None:
    """Allow packed copies from now on, or drop them.

    A layer that is spread over processes has none: they would be copies of the whole weight.
    """
    for layer in view.layers.values():
        vars(layer)["lora_packed"] = PackedWeight() if allowed and not _is_spread(layer) else None


def _is_spread(layer: LoRALayer) -> bool:
    return any(is_spread(parameter) for parameter in layer.parameters(recurse=False))


def packed_layers(view: View) -> list[PackedWeight]:
    """Return the copies of the layers that have some now."""
    return [layer.lora_packed for layer in view.layers.values() if layer.lora_packed and layer.lora_packed.is_filled]

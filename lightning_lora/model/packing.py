"""Let layers keep packed copies of their frozen weights."""

from lightning_lora.functional.packing import PackedWeight
from lightning_lora.model.view import View


def set_packing(view: View, allowed: bool) -> None:
    """Allow packed copies from now on, or drop them."""
    for layer in view.layers.values():
        vars(layer)["lora_packed"] = PackedWeight() if allowed else None


def packed_layers(view: View) -> list[PackedWeight]:
    """Return the copies of the layers that have some now."""
    return [layer.lora_packed for layer in view.layers.values() if layer.lora_packed and layer.lora_packed.is_filled]

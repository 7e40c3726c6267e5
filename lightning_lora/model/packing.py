"""Let layers keep packed copies of their frozen weights."""

from lightning_lora.functional.packing import PackedWeight
from lightning_lora.model.view import View


def set_packing(view: View, allowed: bool) -> None:
    """Allow packed copies from now on, or drop them."""
    for layer in view.layers.values():
        vars(layer)["lora_packed"] = PackedWeight() if allowed else None


def has_packed(view: View) -> bool:
    """Whether any layer has packed copies now."""
    return any(layer.lora_packed is not None and layer.lora_packed.is_filled for layer in view.layers.values())

"""Copies that no code has moved after originals that have learned: an average should have followed."""

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.named import modules_around, where


class UnmovedCopies(Guard):
    """Names copies that stay where they began."""

    def training_ended(self, view: View) -> None:
        """Look at which adapters have moved."""
        moved = modules_around(where(view.layers, has_learned))
        unmoved = []
        for copy, original in view.adapter.networks.copies.items():
            if original in moved and copy not in moved:
                unmoved.append(f"{copy!r} of {original!r}")
        if unmoved:
            rank_zero_info(
                f"Copies in {view.title} that no code has moved: {', '.join(unmoved)}. They compute what they did "
                "before. If one is an average that has begun, its code may look for parameters by the names they had "
                "before the fit, as ema_pytorch does: make it in on_fit_start."
            )


def has_learned(layer: LoRALayer) -> bool:
    """Whether a layer's update is not zero."""
    return not layer.lora_is_fresh()

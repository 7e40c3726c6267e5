"""Copies that no code has moved after originals that have learned: an average should have followed."""

from collections.abc import Iterable

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.names import is_in_any


class UnmovedCopies(Guard):
    """Names copies that stay where they began."""

    def training_ended(self, view: View) -> None:
        """Look at which adapters have moved."""
        moved = [name for name, layer in view.layers.items() if not layer.lora_is_fresh()]
        unmoved = []
        for copy, original in view.adapter.networks.copies.items():
            if _is_any_in(moved, original) and not _is_any_in(moved, copy):
                unmoved.append(f"{copy!r} of {original!r}")
        if unmoved:
            rank_zero_info(
                f"Copies in {view.title} that no code has moved: {', '.join(unmoved)}. They compute what they did "
                "before. If one is an average that has begun, its code may look for parameters by the names they had "
                "before the fit, as ema_pytorch does: make it in on_fit_start."
            )


def _is_any_in(layers: Iterable[str], network: str) -> bool:
    return any(is_in_any(layer, [network]) for layer in layers)

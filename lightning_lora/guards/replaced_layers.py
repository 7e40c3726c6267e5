"""Layers that were replaced, and so have lost adapters that had learned."""

from collections.abc import Mapping

from torch import nn

from lightning_lora.errors import listed, warn
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.named import where, without


class ReplacedLayers(Guard):
    """Names layers that get new adapters in place of trained ones."""

    def layers_chosen(self, view: View, chosen: Mapping[str, nn.Module]) -> None:
        """Look at the layers that had adapters before."""
        if not view.is_adapted or view.is_merged or not view.adapter.is_trained:
            return
        plain = without(chosen, where(chosen, _is_adapted))
        lost = [name for name in view.adapter.layers if name in plain]
        if lost:
            warn(
                f"New adapters for {listed(lost)} of {view.title}: the layers were replaced, and had adapters that "
                "learned."
            )


def _is_adapted(layer: nn.Module) -> bool:
    return isinstance(layer, LoRALayer)

"""Layers that were replaced, and so have lost adapters that had learned."""

from collections.abc import Collection

from lightning_lora.errors import listed, warn
from lightning_lora.model.view import View
from lightning_lora.moments import Guard


class ReplacedLayers(Guard):
    """Names layers that get new adapters in place of trained ones."""

    def layers_chosen(self, view: View, new: Collection[str]) -> None:
        """Look for those that had adapters before."""
        if not view.is_on_layers or not view.adapter.may_have_learned:
            return
        lost = [name for name in view.adapter.layers if name in new]
        if lost:
            warn(
                f"New adapters for {listed(lost)} of {view.title}: the layers were "
                "replaced, and had adapters that learned."
            )

"""A backward pass while the base is shown: what trains in full gets no gradient there."""

from lightning_lora.errors import listed, warn
from lightning_lora.model.view import View
from lightning_lora.moments import Guard


class BaseShown(Guard):
    """Names what should have got a gradient."""

    def backward_begins_without_adapters(self, view: View) -> None:
        """Name what trains in full."""
        trained = view.trainable_base
        if trained:
            warn(
                f"A backward pass in a block of disable_adapters: {listed(trained)} of "
                f"{view.title} hold the base's values there, and get no gradient. Call "
                "it after the block, in which only the base's outputs are computed."
            )

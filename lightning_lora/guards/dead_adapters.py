"""Adapters that receive no gradient: the loss does not depend on them, or not in the first batches."""

from collections.abc import Sequence

from lightning_lora.errors import DeadAdapterWarning, listed, warn
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.names import modules_around


class DeadAdapters(Guard):
    """Names layers whose adapters have no gradient in their optimizer's first step."""

    def optimizer_begins(self, view: View, unreached: Sequence[str]) -> None:
        """Name them, and those that look untrained too."""
        all_of_them = ""
        if view.layers.keys() <= set(unreached):
            all_of_them = f"These are all adapters of {view.title}. "
        message = (
            f"The adapters of {listed(unreached)} received no gradient before the "
            f"first optimizer step. {all_of_them}Either these layers run under no_grad() "
            "or detach(); or the loss does not depend on them: leave them out with "
            "exclude_modules. Less often, only other batches use them (as with experts), "
            "or other code freezes them (requires_grad) or reads their weights without "
            "calling the layers (name these weights in target_parameters)."
        )
        fresh = _fresh_among(view, unreached)
        if fresh:
            message += (
                f" {listed(fresh)} look untrained too: leave them out then, whatever "
                "FreshLayerWarning says."
            )
        warn(message, DeadAdapterWarning)


def _fresh_among(view: View, layers: Sequence[str]) -> list[str]:
    """Those of these layers with a weight that looks untrained."""
    untrained = modules_around(view.adapter.known_of_no_base)
    return [name for name in layers if name in untrained]

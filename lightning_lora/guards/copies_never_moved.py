"""Copies with adapters that no code has moved after originals that have learned: an average should have followed."""

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.model.still.find_still import layers_that_have_learned
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.networks.copies import pairs_of
from lightning_lora.tensors.dicts import with_values, without
from lightning_lora.tensors.names import modules_around


class CopiesNeverMoved(Guard):
    """Names copies that stay where they began."""

    def training_ended(self, view: View) -> None:
        """Look at which adapters have moved: those of an original by steps, those of its copy by other code."""
        moved = modules_around(layers_that_have_learned(view))
        originals_by_copy = view.adapter.networks.copies
        copies_of_moved = with_values(originals_by_copy, moved)
        unmoved = without(copies_of_moved, moved)
        if unmoved:
            rank_zero_info(
                f"Copies in {view.title} that no code has moved: {pairs_of(unmoved)}. "
                "They compute what they did before. If one is an average that has "
                "begun, its code may look for parameters by the names they had before "
                "the fit, as ema_pytorch does: make it in on_fit_start."
            )

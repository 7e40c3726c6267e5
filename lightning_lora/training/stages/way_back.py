"""How a module came to a stage, and the way back to that."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.model.merge import merge
from lightning_lora.model.records import find_record
from lightning_lora.model.remove import remove_adapters
from lightning_lora.model.unmerge import unmerge_or_forget
from lightning_lora.model.view import View
from lightning_lora.training.stages.chosen_adapter import ChosenAdapter
from lightning_lora.training.stages.phases import Outcome


@dataclass
class WayBack:
    """Notes what a stage does to a module, to undo it.

    In this order: the callback's ``setup`` calls ``note_adapters``, whose answer the
    checks need. Then the stage calls ``unmerge``, ``note_other_adapter`` and
    ``note_new_adapters``, and at its end ``bring_about``.
    """

    adapter: ChosenAdapter
    """The adapter that the stage uses."""

    came: Literal["plain", "adapted", "merged"] = "plain"
    """How the module came: known once ``unmerge`` was called."""

    undo: ExitStack = field(default_factory=ExitStack)
    """Gives the module back as it came.

    Only ``bring_about`` closes it, for GIVEN_BACK. For SHOWN_AGAIN it stays open: it
    would remove the adapters that were loaded. So the two steps that are undone then
    stand there by hand.
    """

    # The way there

    def note_adapters(self, pl_module: LightningModule) -> None:
        """Note whether the module came with adapters on its layers: its own, or those of networks inside."""
        # view_of would refuse a plain module
        if View(pl_module).layers:
            self.came = "adapted"

    def unmerge(self, pl_module: LightningModule) -> None:
        """Undo a merge, and note that the module came merged.

        If the merged weights were replaced since, they are a new base: the record of
        the merge is forgotten, and the module came plain.
        """
        if unmerge_or_forget(pl_module, self.undo):
            self.came = "merged"

    def note_other_adapter(self, pl_module: LightningModule) -> None:
        """Note that the stage's adapter is active now, in place of another one."""
        self.undo.callback(self.adapter.switch_back, pl_module)

    def note_new_adapters(self, pl_module: LightningModule) -> None:
        """Note that a module which came plain gets its adapters from now on."""
        if self.came == "plain":
            self.undo.callback(_remove_all, pl_module)

    # The way back

    def allows(
        self,
        outcome: Outcome,
        pl_module: LightningModule,
        *,
        others_may_be_missing: bool,
    ) -> bool:
        """Whether an outcome is possible after an error.

        ``others_may_be_missing``: other processes may not be here, so nothing that
        needs them is done.
        """
        if outcome is Outcome.KEPT:
            return View(pl_module).is_on_layers
        if outcome is Outcome.GIVEN_BACK:
            return self._can_give_back(
                pl_module, others_may_be_missing=others_may_be_missing
            )
        return True

    def _can_give_back(
        self, pl_module: LightningModule, *, others_may_be_missing: bool
    ) -> bool:
        """Whether a module can be given back.

        - A module that is merged now cannot: it was evaluated so, or its own code has
          merged what it trained.
        - A module that came merged would be merged again. All processes must merge
          together: where some may be missing, its adapters stay.
        """
        if View(pl_module).is_merged:
            return False
        return not (others_may_be_missing and self.came == "merged")

    def bring_about(
        self, outcome: Outcome, pl_module: LightningModule, *, has_loaded: bool = False
    ) -> None:
        """Do to the module what an outcome says.

        ``has_loaded``: it has a file's adapters.
        """
        if outcome is Outcome.GIVEN_BACK:
            self.undo.close()
        elif outcome is Outcome.SHOWN_AGAIN and find_record(pl_module) is not None:
            self.adapter.switch_back(pl_module)
            if self.came == "merged":
                self._merge_again(pl_module, has_loaded=has_loaded)

    def _merge_again(self, pl_module: LightningModule, *, has_loaded: bool) -> None:
        merge(pl_module)
        if has_loaded and self.adapter.is_shown_by(pl_module):
            title = type(pl_module).__name__
            rank_zero_info(
                f"LoRA: merged the checkpoint's adapters. {title} is plain again, and "
                "keeps these weights."
            )


def _remove_all(pl_module: LightningModule) -> None:
    """Remove the adapters of the layers that have some now.

    Code in the fit may have replaced some of the adapted layers. ``remove_adapters``
    refuses a record that names these, so it names only those that are left.
    """
    record = find_record(pl_module)
    if record is not None:
        record.adapter.layers = tuple(View(pl_module).layers)
        remove_adapters(pl_module)

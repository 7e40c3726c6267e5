"""How a module came to a stage, and the way back to that."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.model.records import find_record
from lightning_lora.model.remove import remove_adapters
from lightning_lora.model.unmerge import unmerge_or_forget
from lightning_lora.model.view import View
from lightning_lora.training.stages.chosen_adapter import ChosenAdapter
from lightning_lora.training.stages.phases import Outcome


@dataclass
class WayBack:
    """Notes how a module came to a stage, to give it back so.

    In this order: the callback's ``setup`` calls ``note_adapters``, whose answer the
    checks need. Then the stage calls ``unmerge``, and at its end ``bring_about``.
    """

    adapter: ChosenAdapter
    """The adapter that the stage uses. It knows which one the module showed before."""

    came: Literal["plain", "adapted", "merged"] | None = None
    """How the module came.

    None: that is not known yet, because the stage has not begun. Nothing is undone
    then.
    """

    undo_unmerge: ExitStack = field(default_factory=ExitStack)
    """Takes back what ``unmerge`` has done: the module is merged again, or has the record of the merge again."""

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
        if unmerge_or_forget(pl_module, self.undo_unmerge):
            self.came = "merged"
        elif self.came is None:
            self.came = "plain"

    # The way back

    def possible_after_error(
        self, pl_module: LightningModule, *, others_may_be_missing: bool
    ) -> set[Outcome]:
        """Return which outcomes are possible.

        - KEPT: adapters are on the layers.
        - GIVEN_BACK: the module is not merged now. If it is, it was evaluated so, or
          its own code has merged what it trained. A module that came merged would be
          merged again, and all processes must merge together. So if
          ``others_may_be_missing`` (some may have ended), its adapters stay.
        - LEFT: always.
        """
        possible = {Outcome.LEFT}
        view = View(pl_module)
        if view.is_on_layers:
            possible.add(Outcome.KEPT)
        would_merge_alone = others_may_be_missing and self.came == "merged"
        if not view.is_merged and not would_merge_alone:
            possible.add(Outcome.GIVEN_BACK)
        return possible

    def bring_about(
        self, outcome: Outcome, pl_module: LightningModule, *, has_loaded: bool = False
    ) -> None:
        """Do to the module what an outcome says.

        ``has_loaded``: it has a file's adapters.
        """
        if outcome is Outcome.GIVEN_BACK:
            self._give_back(pl_module)
        elif outcome is Outcome.SHOWN_AGAIN and find_record(pl_module) is not None:
            self._show_again(pl_module, has_loaded=has_loaded)

    def _give_back(self, pl_module: LightningModule) -> None:
        """Undo all that the stage did, the last step first."""
        if self.came == "plain":
            _remove_all(pl_module)
        self.adapter.switch_back(pl_module)
        self.undo_unmerge.close()

    def _show_again(self, pl_module: LightningModule, *, has_loaded: bool) -> None:
        """Let the module show what it showed before: another adapter, or merged weights."""
        self.adapter.switch_back(pl_module)
        # a module that came plain keeps the adapters that it has loaded: the record of a
        # replaced merge does not come back
        if self.came != "merged":
            return
        self.undo_unmerge.close()
        # if another adapter is shown again, that one is merged
        if has_loaded and self.adapter.is_shown_by(pl_module):
            _tell_of_merge(pl_module)


def _tell_of_merge(pl_module: LightningModule) -> None:
    """Say that a module which came merged is merged again, with what the stage has loaded."""
    title = type(pl_module).__name__
    rank_zero_info(
        f"LoRA: merged the checkpoint's adapters. {title} is plain again, and keeps "
        "these weights."
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

"""How a resumed run goes on with the random numbers of its checkpoint, and so with the same batches.

Loaders draw when they begin, their workers draw ahead, and other code may draw or seed
at any time. So the generators are set twice: when Lightning begins the data, and for
the first step.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_lora.private import begin_loaders_again, loader_of, loader_states
from lightning_lora.training.random_numbers.generator_states import (
    RANDOM,
    States,
    set_states,
    states_here,
    stored_here,
)


class RandomNumbers:
    """The random numbers of a stage that resumes nothing: whatever the generators give."""

    def begin_data(self, loader: Any) -> None:
        """Let a loader draw as it will."""

    def set_for_first_step(self) -> None:
        """Set nothing."""


class ResumedNumbers(RandomNumbers):
    """The random numbers of a checkpoint, for one fit."""

    def __init__(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.device = trainer.strategy.root_device
        self.stored = stored_here(checkpoint[RANDOM], trainer)
        self.epoch: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"][
            "processed"
        ]
        # a loader is being set up with the stored states
        self.is_beginning_data = False
        self.after_the_data: States = {}  # the states when the data have begun
        self.loop: Any = trainer.fit_loop
        self.loader_states: Any = []
        self.setup_data = self.loop.setup_data  # Lightning's own
        vars(self.loop)["setup_data"] = self._setup_data

    def close(self) -> None:
        """Give the loop Lightning's own way of beginning its data back."""
        vars(self.loop).pop("setup_data", None)

    # When the data begin

    def _setup_data(self) -> None:
        """Stand for Lightning's ``setup_data``, and note the states when the data have begun."""
        self.loader_states = loader_states(self.loop) or self.loader_states
        self.setup_data()
        if self.is_beginning_data:
            self.is_beginning_data = False
            self.after_the_data = states_here(self.device)

    def begin_data(self, loader: Any) -> None:
        """Set the generators for a loader that begins next, and its sampler's epoch.

        Workers draw ahead.
        """
        if self.trainer.training:
            self.is_beginning_data = True
            set_states(self.stored, self.device)
            _set_epoch(loader, self.epoch)

    # When the training begins

    def set_for_first_step(self) -> None:
        """Set the generators for the first step.

        Data that began with other numbers begin again.

        - Where Lightning begins the epoch's data later (before 2.6), they get the
          states of the file.
        - Where it goes on within an epoch (since 2.6), the first step does: its data
          had begun in the file.
        - Otherwise, this epoch's data have begun here, and the states are those from
          then.
        """
        has_another_epoch = self._set_another_epoch()
        begins_data_later = self._begins_data_later()
        if not begins_data_later and (
            has_another_epoch or self._began_without_states()
        ):
            self._begin_data_again()
        if begins_data_later or self._goes_on_within_an_epoch():
            set_states(self.stored, self.device)
        else:  # the file was written between two epochs
            set_states(self.after_the_data, self.device)

    def _set_another_epoch(self) -> bool:
        """Set the epoch of loaders that began with another one.

        Return whether one has an epoch.
        """
        epoch = self.loop.epoch_progress.current.processed
        if epoch == self.epoch:
            return False
        have_an_epoch = [
            _set_epoch(loader, epoch) for loader in loader_of(self.loop).flattened
        ]
        return any(have_an_epoch)

    def _begins_data_later(self) -> bool:
        """Whether the epoch's data begin after this: before Lightning 2.6, a later epoch begins its data."""
        if self._knows_resuming:
            return False
        return self.trainer.current_epoch > 0 and not self.loop.epoch_loop.restarting

    def _began_without_states(self) -> bool:
        """Whether the data began too early: without the random numbers, or the loaders' own states."""
        if not self.after_the_data:
            return True
        return bool(self.loop.restarting and loader_states(self.loop))

    def _begin_data_again(self) -> None:
        """Begin the loaders again with the stored numbers, and note the states then."""
        set_states(self.stored, self.device)
        begin_loaders_again(self.loop, self.loader_states)
        self.after_the_data = states_here(self.device)

    def _goes_on_within_an_epoch(self) -> bool:
        """Whether Lightning goes on in the middle of an epoch, whose data had begun in the file."""
        if not (self._knows_resuming and self.loop.restarting):
            return False
        epoch_loop = self.loop.epoch_loop
        is_over = (
            epoch_loop.restarted_on_train_batch_end
            and epoch_loop.batch_progress.is_last_batch
        )
        return not is_over

    @property
    def _knows_resuming(self) -> bool:
        """Whether Lightning itself knows where in an epoch a fit resumes: since 2.6."""
        return hasattr(type(self.loop), "is_resuming")


def _set_epoch(loader: Any, epoch: int) -> bool:
    """Set the epoch of a loader's samplers, as Lightning does later.

    Return whether one has an epoch.
    """
    was_set = False
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(owner, "sampler", None)
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
            was_set = True
    return was_set

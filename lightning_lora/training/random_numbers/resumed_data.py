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
    """The random numbers of a checkpoint, for one fit.

    Who calls what, in order:

    1. ``on_load_checkpoint`` of the callback makes the object. From then on, it stands
       in the loop's ``setup_data``, until the training ends and the callback closes it.
    2. Lightning calls ``setup_data``, which is ``_setup_data`` here. In it, our method
       of the strategy calls ``begin_data`` for each loader that is made: this sets the
       states of the file. When all have begun, the states are noted.
    3. ``on_train_start`` of the callback calls ``set_for_first_step``, through the
       stage. The stage needs nothing more of the object then.
    4. Lightning may call ``setup_data`` again in a later epoch: this notes states that
       nobody asks for.

    Which states the first step gets::

        the fit resumes                      states       why
        before 2.6, at the start of a later
          epoch                              of the file  its data begin after this
        since 2.6, within an epoch           of the file  its data had begun before
        otherwise                            after data   its data have begun here
    """

    def __init__(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.device = trainer.strategy.root_device
        self.states_in_file = stored_here(checkpoint[RANDOM], trainer)
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        self.epoch_in_file: int = progress["current"]["processed"]
        # whether a loader is being set up with the states of the file
        self.is_beginning_data = False
        # empty until data have begun with the states of the file
        self.states_after_data: States = {}
        self.loop: Any = trainer.fit_loop
        # what the file holds of loaders that have states of their own
        self.stored_loader_states: Any = []
        self.lightnings_setup_data = self.loop.setup_data
        vars(self.loop)["setup_data"] = self._setup_data

    def close(self) -> None:
        """Give the loop Lightning's own way of beginning its data back."""
        vars(self.loop).pop("setup_data", None)

    # When the data begin

    def _setup_data(self) -> None:
        """Call Lightning's ``setup_data``, and note the states when the data have begun.

        In it, the strategy calls ``begin_data`` for each loader that is made. Lightning
        forgets the states of loaders that it has loaded: they are kept here.
        """
        self.stored_loader_states = (
            loader_states(self.loop) or self.stored_loader_states
        )
        self.lightnings_setup_data()
        if self.is_beginning_data:
            self.is_beginning_data = False
            self.states_after_data = states_here(self.device)

    def begin_data(self, loader: Any) -> None:
        """Set the generators for a loader that begins next, and its sampler's epoch.

        Its workers draw before the first step.
        """
        if self.trainer.training:
            self.is_beginning_data = True
            set_states(self.states_in_file, self.device)
            _set_epoch(loader, self.epoch_in_file)

    # When the training begins

    def set_for_first_step(self) -> None:
        """Set the generators for the first step.

        - Where Lightning begins the epoch's data only after this (before 2.6), they
          begin with the states of the file.
        - Otherwise, data that began with other numbers begin again. Then, if the fit
          goes on within an epoch, the first step gets the states of the file, whose
          data had begun before it was written. If the file was written between two
          epochs, the first step comes after the beginning of the data here.
        """
        has_another_epoch = self._set_another_epoch()
        if self._begins_data_later():
            set_states(self.states_in_file, self.device)
            return
        if has_another_epoch or self._began_without_states():
            self._begin_data_again()
        if self._goes_on_within_an_epoch():
            set_states(self.states_in_file, self.device)
        else:
            set_states(self.states_after_data, self.device)

    def _set_another_epoch(self) -> bool:
        """If the fit begins in another epoch than the file's, set it in the loaders' samplers.

        Return whether a sampler has an epoch.
        """
        epoch = self.loop.epoch_progress.current.processed
        if epoch == self.epoch_in_file:
            return False
        have_an_epoch = [
            _set_epoch(loader, epoch) for loader in loader_of(self.loop).flattened
        ]
        return any(have_an_epoch)

    def _begins_data_later(self) -> bool:
        """Whether Lightning begins the epoch's data after this: before 2.6, if this is not the first epoch."""
        if self._knows_resuming:
            return False
        return self.trainer.current_epoch > 0 and not self.loop.epoch_loop.restarting

    def _began_without_states(self) -> bool:
        """Whether the data began too early: without the random numbers, or the loaders' own states."""
        if not self.states_after_data:
            return True
        # states that still wait here are loaded into no loader yet
        return bool(self.loop.restarting and loader_states(self.loop))

    def _begin_data_again(self) -> None:
        """Begin the loaders again with the states of the file, and note the states then."""
        set_states(self.states_in_file, self.device)
        begin_loaders_again(self.loop, self.stored_loader_states)
        self.states_after_data = states_here(self.device)

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

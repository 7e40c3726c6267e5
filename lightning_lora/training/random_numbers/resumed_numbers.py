"""How a resumed run goes on with the random numbers of its checkpoint, and so with the same batches.

Other code may draw or seed at any time. So the generators are set twice: when Lightning
begins the data, and for the first step.
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer

from lightning_lora.training.random_numbers.resumed_data import ResumedData


class RandomNumbers:
    """The random numbers of a stage that resumes nothing: whatever the generators give."""

    def begin_loader(self, loader: Any) -> None:
        """Let a loader draw as it will."""

    def set_for_first_step(self) -> None:
        """Set nothing."""


class ResumedNumbers(RandomNumbers):
    """The random numbers of a checkpoint, for one fit. Lightning is 2.6 or later.

    Who calls what, in order:

    1. ``on_load_checkpoint`` of the callback makes the object, and closes it when the
       training ends.
    2. When Lightning begins the data, our method of the strategy calls
       ``begin_loader`` for each loader.
    3. ``on_train_start`` of the callback calls ``set_for_first_step``, through the
       stage, which needs nothing more of the object then.
    """

    def __init__(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.loop: Any = trainer.fit_loop
        self.data = ResumedData(trainer, checkpoint)

    def begin_loader(self, loader: Any) -> None:
        """Let a loader of the fit draw from the states of the file."""
        self.data.begin_loader(loader)

    def set_for_first_step(self) -> None:
        """Set the generators for the first step.

        First, data that have begun otherwise begin again. Then:

        - If the fit goes on within an epoch, the first step gets the states of the
          file: the epoch's data had begun before it was written.
        - If an epoch begins, its data have begun here, after the file was written: the
          first step gets the states after that.
        """
        epoch = self.loop.epoch_progress.current.processed
        if self.data.have_begun_otherwise(epoch):
            self.data.begin_again(epoch)
        if self._goes_on_within_an_epoch():
            self.data.set_states_in_file()
        else:
            self.data.set_states_after_beginning()

    def _goes_on_within_an_epoch(self) -> bool:
        """Whether the fit goes on in the middle of an epoch."""
        if not self.loop.restarting:
            return False
        epoch_loop = self.loop.epoch_loop
        is_over = (
            epoch_loop.restarted_on_train_batch_end
            and epoch_loop.batch_progress.is_last_batch
        )
        return not is_over

    def close(self) -> None:
        """Let the loop's data begin without this object."""
        self.data.close()


class ResumedNumbersBefore26(ResumedNumbers):
    """The same for Lightning before 2.6, which does not know where in an epoch a fit resumes."""

    def set_for_first_step(self) -> None:
        """Set the generators for the first step.

        Here, the data of a later epoch than the first begin only after this call: so
        they too get the states of the file.
        """
        epoch_loop = self.loop.epoch_loop
        if self.trainer.current_epoch > 0 and not epoch_loop.restarting:
            self.data.set_states_in_file()
        else:
            super().set_for_first_step()

    def _goes_on_within_an_epoch(self) -> bool:
        """The first step always comes after the beginning of the data."""
        return False


def resumed_numbers(trainer: Trainer, checkpoint: Mapping[str, Any]) -> ResumedNumbers:
    """Return the random numbers of a checkpoint, for the fit of this Trainer."""
    knows_resuming = hasattr(type(trainer.fit_loop), "is_resuming")
    kind = ResumedNumbers if knows_resuming else ResumedNumbersBefore26
    return kind(trainer, checkpoint)

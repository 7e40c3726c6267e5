"""The data of a resumed fit, which begin with the random numbers of its checkpoint."""

from collections.abc import Iterable, Mapping
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


class ResumedData:
    """Lets the data of one fit begin with the random numbers of its checkpoint.

    Loaders draw when they begin, and their workers draw ahead. So the generators are
    set before each loader begins, and their states are noted when all have begun.

    Until ``close``, this object stands in the loop's ``setup_data``. Lightning calls
    that before the first epoch, and again in later ones: what is noted then, nobody
    asks for. In it, our method of the strategy calls ``begin_loader`` for each loader
    that is made.
    """

    def __init__(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.device = trainer.strategy.root_device
        self.states_in_file = stored_here(checkpoint[RANDOM], trainer)
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        self.epoch_in_file: int = progress["current"]["processed"]
        # None: no data have begun with the states of the file yet
        self.states_after_beginning: States | None = None
        # whether a loader was made in the call of setup_data that runs now
        self.is_beginning = False
        self.loop: Any = trainer.fit_loop
        # what the file holds of loaders that have states of their own
        self.stored_loader_states: Any = []
        self.lightnings_setup_data = self.loop.setup_data
        vars(self.loop)["setup_data"] = self._setup_data

    def close(self) -> None:
        """Give the loop Lightning's own ``setup_data`` back."""
        vars(self.loop).pop("setup_data", None)

    def _setup_data(self) -> None:
        """Call Lightning's ``setup_data``, and note the states if data have begun in it.

        Lightning forgets the states of loaders that it has loaded: they are kept here.
        """
        self.stored_loader_states = (
            loader_states(self.loop) or self.stored_loader_states
        )
        self.lightnings_setup_data()
        if self.is_beginning:
            self.is_beginning = False
            self.states_after_beginning = states_here(self.device)

    def begin_loader(self, loader: Any) -> None:
        """Set the generators for a training loader that begins next, and its sampler's epoch."""
        if self.trainer.training:  # a fit makes loaders of its validation too
            self.is_beginning = True
            self.set_states_in_file()
            _set_epoch([loader], self.epoch_in_file)

    def have_begun_otherwise(self, epoch: int) -> bool:
        """Whether the data have begun otherwise than a fit needs that goes on in ``epoch``.

        - They began too early: without the random numbers, or the loaders' own states.
        - They began in another epoch, and have another order there. A file that was
          written at the last batch of an epoch names that epoch, and the fit goes on in
          the next one.
        """
        if self.states_after_beginning is None:
            return True
        # states that still wait here are loaded into no loader yet
        if self.loop.restarting and loader_states(self.loop):
            return True
        return epoch != self.epoch_in_file and bool(_samplers_of(self.loaders()))

    def begin_again(self, epoch: int) -> None:
        """Begin the loaders again, in ``epoch`` and with the states of the file, and note the states then."""
        _set_epoch(self.loaders(), epoch)
        self.set_states_in_file()
        begin_loaders_again(self.loop, self.stored_loader_states)
        self.states_after_beginning = states_here(self.device)

    def loaders(self) -> list[Any]:
        """Return the training loaders."""
        loaders: list[Any] = loader_of(self.loop).flattened
        return loaders

    def set_states_in_file(self) -> None:
        """Set the generators as they were when the file was written."""
        set_states(self.states_in_file, self.device)

    def set_states_after_beginning(self) -> None:
        """Set the generators as they were when the data had begun here."""
        assert self.states_after_beginning is not None
        set_states(self.states_after_beginning, self.device)


def _set_epoch(loaders: Iterable[Any], epoch: int) -> None:
    """Set the epoch of loaders' samplers, as Lightning does later."""
    for sampler in _samplers_of(loaders):
        sampler.set_epoch(epoch)


def _samplers_of(loaders: Iterable[Any]) -> list[Any]:
    """The samplers that have an order for each epoch, as DistributedSampler has."""
    found = []
    for loader in loaders:
        for owner in (loader, getattr(loader, "batch_sampler", None)):
            sampler = getattr(owner, "sampler", None)
            if callable(getattr(sampler, "set_epoch", None)):
                found.append(sampler)
    return found

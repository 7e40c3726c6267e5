"""The random numbers of a run: a resumed one goes on with the same, and adapters take none from the data."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from struct import Struct
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_lora.model.view import View
from lightning_lora.private import begin_loaders_again, loader_of, loader_states

RANDOM = "lightning_lora_random"  # the checkpoint entry with the states of the generators

_OTHERS = Struct("<625Iid625Id")  # numpy's and Python's: 624 numbers of a Mersenne twister, its place, and what waits

States = dict[str, Tensor]
"""The states of generators, by name: "cpu", "cuda", and "others" for those of numpy and Python."""


@contextmanager
def reseeded(model: nn.Module) -> Iterator[None]:
    """Go on with a seed that is drawn first: however much new adapters draw, the run then sees the same batches."""
    before = torch.get_rng_state()
    adapted = View(model).matrices
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    torch.set_rng_state(before)
    yield  # after an error, another injection follows
    if View(model).matrices != adapted:
        torch.manual_seed(seed)


# The states of all processes


def random_states(trainer: Trainer) -> States:
    """Return the states of the generators of torch, numpy and Python in all processes."""
    device = trainer.strategy.root_device
    states = _states_here(device)
    for name, state in states.items():
        of_all = _of_all_processes(trainer, state.to(device))
        states[name] = of_all.reshape(-1, len(state)).cpu()
    return states


def _of_all_processes(trainer: Trainer, state: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return trainer.strategy.all_gather(state)
    rows = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, state)  # Lightning's own all_gather is for gradients too; torch warns about that
    return torch.stack(rows)


# The states of this process, as bytes


def _states_here(device: torch.device) -> States:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if np.random.get_state(legacy=False)["bit_generator"] == "MT19937":  # otherwise, the user has set another one
        states["others"] = _state_of_others()
    return states


def _state_of_others() -> Tensor:
    """The states of numpy's and Python's generators. Speech models of transformers mask their audio with numpy's."""
    _, numpys_numbers, *numpys_rest = np.random.get_state(legacy=True)
    _, pythons_numbers, waiting = random.getstate()
    if waiting is None:
        waiting = math.nan
    numbers = list(map(int, numpys_numbers))
    packed = _OTHERS.pack(*numbers, *numpys_rest, *pythons_numbers, waiting)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _set_states(states: States, device: torch.device) -> None:
    setters: dict[str, Callable[[Tensor], None]] = {
        "cpu": torch.set_rng_state,
        "cuda": partial(torch.cuda.set_rng_state, device=device),
        "others": _set_state_of_others,
    }
    for name, state in states.items():
        setters[name](state)


def _set_state_of_others(state: Tensor) -> None:
    *values, waiting = _OTHERS.unpack(bytes(state.tolist()))
    numbers = np.array(values[:624], dtype=np.uint32)
    np.random.set_state(("MT19937", numbers, *values[624:627]))
    if math.isnan(waiting):
        waiting = None
    random.setstate((3, tuple(values[627:]), waiting))


def _stored_here(stored: Mapping[str, Any], trainer: Trainer) -> States:
    """This process's states of a file. Those of another machine, or of other processes, are left out."""
    states: States = {}
    for name, here in _states_here(trainer.strategy.root_device).items():
        rows = stored.get(name)
        if _fits(rows, here, trainer.world_size):
            states[name] = rows[trainer.global_rank].clone()  # torch crashes on a row that is a view
    return states


def _fits(rows: object, here: Tensor, processes: int) -> TypeGuard[Tensor]:
    """Whether there is a state for each process, as it is here."""
    return isinstance(rows, Tensor) and rows.dtype == here.dtype and rows.shape == (processes, len(here))


class NotResumed:
    """A stage that goes on with no random numbers of a checkpoint."""

    def begin_data(self, loader: Any) -> None:
        """Let a loader draw as it will."""

    def begin_training(self) -> None:
        """Set nothing."""


class Resumed(NotResumed):
    """The random numbers of a checkpoint. A resumed fit begins its data with them, once, and then its training."""

    def __init__(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        self.trainer = trainer
        self.device = trainer.strategy.root_device
        self.states = _stored_here(checkpoint[RANDOM], trainer)
        self.epoch: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        self.data_begin = False  # a loader is being set up with the states
        self.after_the_data: States = {}  # the states when the data have begun
        self.loop: Any = trainer.fit_loop
        self.loader_states: Any = []
        self.setup_data = self.loop.setup_data  # Lightning's own
        vars(self.loop)["setup_data"] = self._setup_data

    def _setup_data(self) -> None:
        """Stand for Lightning's ``setup_data``, and note the states when the data have begun."""
        self.loader_states = loader_states(self.loop) or self.loader_states
        self.setup_data()
        if self.data_begin:
            self.data_begin = False
            self.after_the_data = _states_here(self.device)

    def begin_data(self, loader: Any) -> None:
        """Set the generators, and a sampler's epoch, for a loader that Lightning begins next: workers draw ahead."""
        if self.trainer.training:
            self.data_begin = True
            _set_states(self.states, self.device)
            _set_epoch(loader, self.epoch)

    def begin_training(self) -> None:
        """Set them for the first step: other code may draw or seed before it. Data that began otherwise begin again."""
        has_another_epoch = self._set_another_epoch()
        if self._begins_data_later():
            _set_states(self.states, self.device)
        elif has_another_epoch or self._began_without_states():
            _set_states(self.states, self.device)
            begin_loaders_again(self.loop, self.loader_states)
        else:
            _set_states(self.after_the_data, self.device)
        if self._goes_on_within_an_epoch():
            _set_states(self.states, self.device)  # of a moment when the epoch's data had begun

    def _begins_data_later(self) -> bool:
        """Whether the epoch's data begin after this: before Lightning 2.6, a later epoch begins its data."""
        if self._knows_resuming:
            return False
        return self.trainer.current_epoch > 0 and not self.loop.epoch_loop.restarting

    def _set_another_epoch(self) -> bool:
        """Set the epoch of loaders that began with another one. Return whether one has an epoch."""
        epoch = self.loop.epoch_progress.current.processed
        if epoch == self.epoch:
            return False
        have_an_epoch = [_set_epoch(loader, epoch) for loader in loader_of(self.loop).flattened]
        return any(have_an_epoch)

    def _began_without_states(self) -> bool:
        """Whether the data began before the random numbers, or the loaders' own states, were there."""
        if not self.after_the_data:
            return True
        return bool(self.loop.restarting and loader_states(self.loop))

    def _goes_on_within_an_epoch(self) -> bool:
        """Whether the checkpoint was written in the middle of an epoch, where Lightning goes on."""
        if not (self._knows_resuming and self.loop.restarting):
            return False
        epoch_loop = self.loop.epoch_loop
        is_over = epoch_loop.restarted_on_train_batch_end and epoch_loop.batch_progress.is_last_batch
        return not is_over

    @property
    def _knows_resuming(self) -> bool:
        """Whether Lightning itself knows where in an epoch a fit resumes: since 2.6."""
        return hasattr(type(self.loop), "is_resuming")


def _set_epoch(loader: Any, epoch: int) -> bool:
    """Set the epoch of a loader's samplers, as Lightning does later. Return whether one has an epoch."""
    was_set = False
    for owner in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(owner, "sampler", None)
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
            was_set = True
    return was_set

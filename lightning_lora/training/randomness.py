"""The random numbers of a run: a resumed one goes on with the same, and adapters take none from the data."""

import math
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from struct import Struct
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn

from lightning_lora.model.view import View
from lightning_lora.private import begin_loaders_again, loader_of, loader_states

RANDOM = "lightning_lora_random"  # the checkpoint entry with the states of the generators

_OTHERS = Struct("<625Iid625Id")  # numpy's and Python's: 624 numbers of a Mersenne twister, its place, and what waits


@contextmanager
def reseeded(model: nn.Module) -> Iterator[None]:
    """Go on with a seed that is drawn first: however much new adapters draw, the run then sees the same batches."""
    before, adapted = torch.get_rng_state(), View(model).matrices
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    torch.set_rng_state(before)
    yield  # after an error, another injection follows
    if View(model).matrices != adapted:
        torch.manual_seed(seed)


def random_states(trainer: Trainer) -> dict[str, Tensor]:
    """Return the states of the generators of torch, numpy and Python in all processes."""
    device, states = trainer.strategy.root_device, _states_here(trainer)
    for name, state in states.items():
        states[name] = _of_all_processes(trainer, state.to(device)).reshape(-1, len(state)).cpu()
    return states


def _states_here(trainer: Trainer) -> dict[str, Tensor]:
    """The states as bytes. Speech models of transformers mask their audio with numpy's."""
    device, states = trainer.strategy.root_device, {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if np.random.get_state(legacy=False)["bit_generator"] != "MT19937":  # the user has set another one
        return states
    _, keys, *rest = np.random.get_state(legacy=True)
    _, numbers, last = random.getstate()
    packed = _OTHERS.pack(*map(int, keys), *rest, *numbers, math.nan if last is None else last)
    return {**states, "others": torch.frombuffer(bytearray(packed), dtype=torch.uint8)}


def _of_all_processes(trainer: Trainer, state: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return trainer.strategy.all_gather(state)
    rows = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, state)  # Lightning's own all_gather is for gradients too; torch warns about that
    return torch.stack(rows)


class Resumed:
    """The random numbers of a checkpoint. A resumed fit begins its data with them, once, and then its training."""

    def __init__(self, trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        self.trainer, self.device, self.states = trainer, trainer.strategy.root_device, dict[str, Tensor]()
        self.begins, self.begun = False, dict[str, Tensor]()  # the states when the data have begun
        self.epoch: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        for name, now in _states_here(trainer).items():
            rows = checkpoint[RANDOM].get(name)
            if isinstance(rows, Tensor) and (rows.dtype, rows.shape) == (now.dtype, (trainer.world_size, len(now))):
                self.states[name] = rows[trainer.global_rank].clone()  # torch crashes on a row that is a view
        self.loop: Any = trainer.fit_loop
        self.loader_states: Any = []
        self.own, vars(self.loop)["setup_data"] = self.loop.setup_data, self._setup_data

    def _setup_data(self) -> None:
        self.loader_states = loader_states(self.loop) or self.loader_states
        self.own()
        if self.begins:
            self.begins, self.begun = False, _states_here(self.trainer)

    def begin_data(self, loader: Any) -> None:
        """Set the generators, and a sampler's epoch, for a loader that Lightning begins next: workers draw ahead."""
        self.begins = True
        self._set(self.states)
        _set_epoch(loader, self.epoch)

    def begin_training(self) -> None:
        """Set them for the first step: other code may draw or seed before it. Data that began otherwise begin again."""
        loop, epoch = self.loop.epoch_loop, self.loop.epoch_progress.current.processed
        is_other = [_set_epoch(loader, epoch) for loader in loader_of(self.loop).flattened if epoch != self.epoch]
        begins_anew = any(is_other) or not self.begun or (self.loop.restarting and loader_states(self.loop))
        is_known = hasattr(type(self.loop), "is_resuming")  # Lightning 2.6: before, a later epoch begins its data
        later = self.trainer.current_epoch > 0 and not loop.restarting and not is_known
        self._set(self.states if begins_anew or later else self.begun)
        if begins_anew and not later:
            begin_loaders_again(self.loop, self.loader_states)
        is_over = is_known and loop.restarted_on_train_batch_end and loop.batch_progress.is_last_batch
        if is_known and self.loop.restarting and not is_over:
            self._set(self.states)  # of a moment when the epoch's data had begun

    def _set(self, states: dict[str, Tensor]) -> None:
        for name, state in states.items():
            if name == "cpu":
                torch.set_rng_state(state)
            elif name == "cuda":
                torch.cuda.set_rng_state(state, self.device)
            else:
                *values, last = _OTHERS.unpack(bytes(state.tolist()))
                np.random.set_state(("MT19937", np.array(values[:624], dtype=np.uint32), *values[624:627]))
                random.setstate((3, tuple(values[627:]), None if math.isnan(last) else last))


def _set_epoch(loader: Any, epoch: int) -> bool:
    """Set the epoch of a loader's samplers, as Lightning does later. Return whether one has an epoch."""
    samplers = [getattr(each, "sampler", None) for each in (loader, getattr(loader, "batch_sampler", None))]
    setters = list(filter(callable, (getattr(sampler, "set_epoch", None) for sampler in samplers)))
    for set_epoch in setters:
        set_epoch(epoch)
    return bool(setters)

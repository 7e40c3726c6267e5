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

    def __init__(self, trainer: Trainer, stored: Mapping[str, Any]) -> None:
        self.trainer, self.device, self.states = trainer, trainer.strategy.root_device, dict[str, Tensor]()
        self.begins, self.begun = False, dict[str, Tensor]()  # the states when the data have begun
        for name, now in _states_here(trainer).items():
            rows = stored.get(name)
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

    def begin_data(self) -> None:
        """Set the generators for a loader that Lightning begins next."""
        self.begins = True
        self._set(self.states)

    def begin_training(self) -> None:
        """Set them for the first step: other code may draw or seed before it. Data that began otherwise begin again."""
        begins_anew = self._set_epoch() or not self.begun or (self.loop.restarting and loader_states(self.loop))
        later = self.trainer.current_epoch > 0 and not self.loop.epoch_loop.restarting  # by Lightning before 2.6
        later = later and not hasattr(type(self.loop), "is_resuming")
        self._set(self.states if begins_anew or later else self.begun)
        if begins_anew and not later:
            begin_loaders_again(self.loop, self.loader_states)

    def _set_epoch(self) -> bool:
        """Set the epoch of samplers, as Lightning does later. Return whether one had another: workers draw ahead."""
        epoch, loaders = self.loop.epoch_progress.current.processed, loader_of(self.loop).flattened
        owners = [*loaders, *(getattr(loader, "batch_sampler", None) for loader in loaders)]
        found: list[Any] = [getattr(owner, "sampler", None) for owner in owners]
        samplers = [sampler for sampler in found if hasattr(sampler, "set_epoch")]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        return bool(epoch and samplers)

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

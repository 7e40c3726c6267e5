"""The states of random number generators, in files: those of all processes."""

import math
import random
from collections.abc import Callable, Mapping
from functools import partial
from struct import Struct
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor

RANDOM = "lightning_lora_random"
"""The checkpoint's entry with the states of the generators."""

States = dict[str, Tensor]
"""The states of generators, by name: "cpu" and "cuda" for torch's, "others" for numpy's and Python's."""

# Numpy's state is 624 numbers of a Mersenne twister, the position in them, whether a
# normal number waits, and that number. Python's is 624 numbers with the position as
# the 625th, and the normal number that waits, or NaN.
_OTHERS = Struct("<625Iid625Id")
_TWISTER = 624
_NUMPYS = 627
"""How many values of ``_OTHERS`` are numpy's: they come first."""


def random_states(trainer: Trainer) -> States:
    """Return the states of all generators, of torch, numpy and Python: one row for each process."""
    device = trainer.strategy.root_device
    states = states_here(device)
    for name, state in states.items():
        of_all = _of_all_processes(trainer, state.to(device))
        states[name] = of_all.reshape(-1, len(state)).cpu()
    return states


def _of_all_processes(trainer: Trainer, state: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return trainer.strategy.all_gather(state)
    rows = [torch.empty_like(state) for _ in range(dist.get_world_size())]
    # Lightning's own all_gather is for gradients too; torch warns about that
    dist.all_gather(rows, state)
    return torch.stack(rows)


# The states of this process, as bytes


def states_here(device: torch.device) -> States:
    """Return the states of this process."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    # a user may have given numpy another kind of generator
    if np.random.get_state(legacy=False)["bit_generator"] == "MT19937":
        states["others"] = _state_of_others()
    return states


def _state_of_others() -> Tensor:
    """The states of numpy's and Python's generators.

    Speech models of transformers mask their audio with numpy's.
    """
    _, numpys_numbers, *numpys_rest = np.random.get_state(legacy=True)
    _, pythons_numbers, waiting = random.getstate()
    if waiting is None:
        waiting = math.nan
    numbers = list(map(int, numpys_numbers))
    packed = _OTHERS.pack(*numbers, *numpys_rest, *pythons_numbers, waiting)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def set_states(states: States, device: torch.device) -> None:
    """Set the generators of this process."""
    setters: dict[str, Callable[[Tensor], None]] = {
        "cpu": torch.set_rng_state,
        "cuda": partial(torch.cuda.set_rng_state, device=device),
        "others": _set_state_of_others,
    }
    for name, state in states.items():
        setters[name](state)


def _set_state_of_others(state: Tensor) -> None:
    *values, waiting = _OTHERS.unpack(bytes(state.tolist()))
    numbers = np.array(values[:_TWISTER], dtype=np.uint32)
    np.random.set_state(("MT19937", numbers, *values[_TWISTER:_NUMPYS]))
    if math.isnan(waiting):
        waiting = None
    random.setstate((3, tuple(values[_NUMPYS:]), waiting))


def stored_here(stored: Mapping[str, Any], trainer: Trainer) -> States:
    """Return this process's states in a file.

    States of another kind of generator, or of another number of processes, are left
    out.
    """
    states: States = {}
    for name, here in states_here(trainer.strategy.root_device).items():
        rows = stored.get(name)
        if _fits(rows, here, trainer.world_size):
            # torch crashes on a row that is a view
            states[name] = rows[trainer.global_rank].clone()
    return states


def _fits(rows: object, here: Tensor, processes: int) -> TypeGuard[Tensor]:
    """Whether these are states for so many processes, of the same kind as the state here."""
    return (
        isinstance(rows, Tensor)
        and rows.dtype == here.dtype
        and rows.shape == (processes, len(here))
    )

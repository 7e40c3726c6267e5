"""DeepSpeed's groups of parameters, of which each process trains a shard: their values and states in full, and back."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import repeat, starmap
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.errors import StrategyError
from lightning_lora.private import own_place

State = dict[str, Any]


class Partition:
    """A group of parameters that lie end to end in one vector. Of it this process trains the shard ``local``.

    ``places`` says what each parameter shares with it: the first number in the parameter, the first in ``local``, and
    how many.
    """

    def __init__(self, parameters: list[nn.Parameter], local: Tensor, places: list[tuple[int, int, int]]) -> None:
        self.parameters = parameters
        self.local = local
        self.places = places

    def _shared(self, number: int, values: Tensor, shard: Tensor) -> tuple[Tensor, Tensor]:
        """The piece that is here of one parameter: of its values, and of a shard."""
        in_values, in_shard, count = self.places[number]
        return values.reshape(-1)[in_values : in_values + count], shard[in_shard : in_shard + count]

    def full(self, shard: Tensor, device: torch.device) -> list[Tensor]:
        """Return the values of all parameters, from all shards."""
        all_values = []
        for number, p in enumerate(self.parameters):
            values = torch.zeros(p.shape, dtype=shard.dtype, device=device)
            here, piece = self._shared(number, values, shard)
            here.copy_(piece)
            dist.all_reduce(values.view(-1).view(torch.uint8))  # as bytes: a sum of numbers loses the sign of zero
            all_values.append(values)
        return all_values

    def local_of(self, all_values: Iterable[Tensor]) -> Tensor:
        """Return this process's shard of the values of all parameters."""
        return self._local_of(dict(enumerate(all_values)))

    def _local_of(self, all_values: Mapping[int, Tensor]) -> Tensor:
        """The same, of the parameters with these numbers. The others' values are zero."""
        shard = torch.zeros_like(self.local)
        for number, values in all_values.items():
            here, piece = self._shared(number, values, shard)
            piece.copy_(here)
        return shard

    def follow(self) -> None:
        """Copy the parameters, except those that are this shard rounded."""
        for number, p in enumerate(self.parameters):
            values, piece = self._shared(number, p.detach(), self.local.detach())
            values = values.to(piece.device)
            is_rounded = piece.to(values.dtype) == values
            piece.copy_(torch.where(is_rounded, piece, values.to(piece.dtype)))

    def has_other_dtype(self) -> bool:
        """Whether what trains is in another dtype than the parameters: copies in float32."""
        return any(p.dtype != self.local.dtype for p in self.parameters)

    def full_states(self, state: State, device: torch.device) -> list[State]:
        """Return the optimizer's state of each parameter."""
        states: list[State] = [{} for _ in self.parameters]
        for name, value in state.items():
            values = self._full_entry(value, device)
            for state_of_one, value_of_one in zip(states, values, strict=True):
                state_of_one[name] = value_of_one
        return states

    def _full_entry(self, value: Any, device: torch.device) -> list[Any]:
        """An entry of this shard's state for each parameter: its values, or one for all, as the number of steps."""
        if isinstance(value, Tensor) and value.shape == self.local.shape:
            return self.full(value, device)
        copies = repeat(value, len(self.parameters))
        return list(map(deepcopy, copies))

    def local_state(self, states: Sequence[State]) -> State:
        """Return the optimizer's state of this shard."""
        entries: dict[str, dict[int, Any]] = {}  # by name, the values of the parameters that have one
        for number, state in enumerate(states):
            for name, value in state.items():
                if value is not None:
                    entries.setdefault(name, {})[number] = value
        return {name: self._local_entry(name, values) for name, values in entries.items()}

    def _local_entry(self, name: str, values: dict[int, Any]) -> Any:
        """One entry of this shard's state: its part of the parameters' values, or one value for all."""
        if all(starmap(self._has_shape_of, values.items())):
            return self._local_of(values)
        for_all, *_ = values.values()
        if isinstance(for_all, Tensor) and for_all.dim():
            raise ValueError(f"its entry {name!r} has other shapes than the parameters")
        return for_all

    def _has_shape_of(self, number: int, value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == self.parameters[number].shape


def full_state(partitions: Sequence[Partition], optimizer: Any, device: torch.device) -> State:
    """Return the state of an optimizer of the full parameters."""
    states: list[State] = []
    groups = []
    for partition, group in zip(partitions, optimizer.param_groups, strict=True):
        first = len(states)
        states += partition.full_states(optimizer.state.get(partition.local, {}), device)
        groups.append({**group, "params": list(range(first, len(states)))})
    return {"state": _without_empty(states), "param_groups": groups}


def local_state(partitions: Sequence[Partition], state: State) -> State:
    """Return the state of an optimizer of this process's shards."""
    _check_sizes(partitions, state)
    states: list[State] = []
    groups = []
    for number, (partition, group) in enumerate(zip(partitions, state["param_groups"], strict=True)):
        of_group = [state["state"].get(key, {}) for key in group["params"]]
        states.append(partition.local_state(of_group))
        groups.append({**group, "params": [number]})
    return {"state": _without_empty(states), "param_groups": groups}


def _without_empty(states: list[State]) -> dict[int, State]:
    """States by number, as an optimizer has them."""
    return {number: state for number, state in enumerate(states) if state}


def _check_sizes(partitions: Sequence[Partition], state: State) -> None:
    saved = [len(group["params"]) for group in state["param_groups"]]
    expected = [len(partition.parameters) for partition in partitions]
    if saved != expected:
        raise ValueError(f"its groups have {saved} parameters, and the module's have {expected}")


def partitions_of(optimizer: Any, idle: set[nn.Parameter]) -> list[Partition]:
    """Return the groups of DeepSpeed's optimizer, without parameters that are idle."""
    partitions = []
    for parameters, group in zip(_parameters_by_group(optimizer), optimizer.param_groups, strict=True):
        used = [p for p in parameters if p not in idle]
        (shard,) = group["params"]
        partitions.append(Partition(used, shard, list(map(own_place, used))))
    return partitions


def _parameters_by_group(optimizer: Any) -> Any:
    """The parameters of each group. The optimizer has two classes: one is for bfloat16 with gradients in float32."""
    for name in ("bit16_groups", "bf16_groups"):
        groups = getattr(optimizer, name, None)
        if groups is not None:
            return groups
    raise StrategyError(
        f"DeepSpeed chose {type(optimizer).__name__} for its configuration, which shares nothing between the "
        "processes. Use ZeRO stage 2, or strategy='ddp'."
    )

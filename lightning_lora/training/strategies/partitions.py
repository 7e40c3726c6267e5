"""DeepSpeed's groups of parameters, of which each process trains a shard: their values and states in full, and back."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.errors import StrategyError
from lightning_lora.private import own_span

OptimizerState = dict[str, Any]
"""The state dict of an optimizer, or what it keeps of one parameter."""


class Piece(NamedTuple):
    """The elements of one parameter that are in this process's shard: some that follow each other, or none."""

    parameter: nn.Parameter
    first: int  # the first one's place in the parameter
    first_in_shard: int
    length: int

    def of_parameter(self, values: Tensor) -> Tensor:
        """Return this piece of values that have the parameter's shape."""
        return values.reshape(-1)[self.first : self.first + self.length]

    def of_shard(self, shard: Tensor) -> Tensor:
        """Return this piece of values that have the shard's shape."""
        return shard[self.first_in_shard : self.first_in_shard + self.length]


class Partition:
    """A group of parameters that lie end to end in one vector.

    Each process trains one ``shard`` of it. ``spans`` says which elements each
    parameter shares with this process's shard (:class:`.OwnSpan`): the first one's
    place in the parameter, its place in the shard, and how many. For example, with a
    shard of 4 elements for each of two processes, parameters of 6, 1 and 1 elements
    have the spans ``(0, 0, 4), (0, 0, 0), (0, 0, 0)`` in the first process, and ``(4,
    0, 2), (0, 2, 1), (0, 3, 1)`` in the second.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        shard: Tensor,
        spans: list[tuple[int, int, int]],
    ) -> None:
        self.parameters = parameters
        self.shard = shard
        self.pieces = [
            Piece(p, *span) for p, span in zip(parameters, spans, strict=True)
        ]

    # Values

    def gather(self, shard: Tensor, device: torch.device) -> list[Tensor]:
        """Return the values of each parameter in full, from the shards of all processes.

        Collective. ``shard`` is this process's: of the parameters, or of something else
        that is sharded as they are.
        """
        all_values = []
        for piece in self.pieces:
            values = torch.zeros(
                piece.parameter.shape, dtype=shard.dtype, device=device
            )
            piece.of_parameter(values).copy_(piece.of_shard(shard))
            # The elements of other processes are zero here. The sum is of bytes: a sum
            # of numbers loses the sign of zero.
            dist.all_reduce(values.view(-1).view(torch.uint8))
            all_values.append(values)
        return all_values

    def scatter(self, values: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Return this process's shard of the values of some parameters.

        It is zero where the other parameters are.
        """
        shard = torch.zeros_like(self.shard)
        for piece in self.pieces:
            if piece.parameter in values:
                of_piece = piece.of_parameter(values[piece.parameter])
                piece.of_shard(shard).copy_(of_piece)
        return shard

    def copy_parameters(self) -> None:
        """Copy the parameters into the shard.

        Where a value of the shard rounds to that of the parameter, the shard keeps it:
        it is the finer one.
        """
        for piece in self.pieces:
            in_shard = piece.of_shard(self.shard.detach())
            values = piece.of_parameter(piece.parameter.detach()).to(in_shard.device)
            is_finer = in_shard.to(values.dtype) == values
            in_shard.copy_(torch.where(is_finer, in_shard, values.to(in_shard.dtype)))

    def has_other_dtype(self) -> bool:
        """Whether the shard has another dtype than the parameters: float32."""
        return any(p.dtype != self.shard.dtype for p in self.parameters)

    # States of the optimizer

    def gather_states(
        self, state: OptimizerState, device: torch.device
    ) -> list[OptimizerState]:
        """Return the optimizer's state of each parameter, such as ``{"step": 2, "exp_avg": ...}``.

        Collective. ``state`` is that of this process's shard.
        """
        states: list[OptimizerState] = [{} for _ in self.parameters]
        for name, value in state.items():
            values = self._gather_entry(value, device)
            for state_of_one, value_of_one in zip(states, values, strict=True):
                state_of_one[name] = value_of_one
        return states

    def _gather_entry(self, value: Any, device: torch.device) -> list[Any]:
        """An entry of this shard's state, for each parameter.

        It is values of the parameter's shape, or one value for all, as the step's number.
        """
        if _has_shape_of(self.shard, value):
            return self.gather(value, device)
        return [deepcopy(value) for _ in self.parameters]

    def scatter_states(self, states: Sequence[OptimizerState]) -> OptimizerState:
        """Return the optimizer's state of this process's shard.

        ``states`` are those of the parameters.
        """
        state_of_shard: OptimizerState = {}
        # in one order in all processes: ``gather_states`` goes through it collectively
        for name in dict.fromkeys(chain.from_iterable(states)):
            # of a parameter without a gradient, there may be no entry, or None
            values = {
                p: state[name]
                for p, state in zip(self.parameters, states, strict=True)
                if state.get(name) is not None
            }
            if values:
                state_of_shard[name] = self._scatter_entry(name, values)
        return state_of_shard

    def _scatter_entry(self, name: str, values: Mapping[nn.Parameter, Any]) -> Any:
        """One entry of this shard's state, such as "exp_avg": its part of these values, or one value for all."""
        if all(map(_has_shape_of, values, values.values())):
            return self.scatter(values)
        for_all, *_ = values.values()
        if isinstance(for_all, Tensor) and for_all.dim():
            raise ValueError(f"its entry {name!r} has other shapes than the parameters")
        return for_all


def _has_shape_of(tensor: Tensor, value: object) -> bool:
    """Whether a value is a tensor of the same shape."""
    return isinstance(value, Tensor) and value.shape == tensor.shape


# The states of a whole optimizer


def gathered_state(
    partitions: Sequence[Partition], optimizer: Any, device: torch.device
) -> OptimizerState:
    """Return the state of an optimizer as if it held the parameters in full.

    Collective.
    """
    states: list[OptimizerState] = []
    groups = []
    for partition, group in zip(partitions, optimizer.param_groups, strict=True):
        first = len(states)
        states += partition.gather_states(
            optimizer.state.get(partition.shard, {}), device
        )
        groups.append({**group, "params": list(range(first, len(states)))})
    return {"state": _without_empty(states), "param_groups": groups}


def scattered_state(
    partitions: Sequence[Partition], state: OptimizerState
) -> OptimizerState:
    """Return the state of an optimizer as if it held this process's shards: one in each group."""
    _check_sizes(partitions, state)
    states: list[OptimizerState] = []
    groups = []
    for partition, group in zip(partitions, state["param_groups"], strict=True):
        states_in_group = [state["state"].get(key, {}) for key in group["params"]]
        groups.append({**group, "params": [len(states)]})
        states.append(partition.scatter_states(states_in_group))
    return {"state": _without_empty(states), "param_groups": groups}


def _without_empty(states: list[OptimizerState]) -> dict[int, OptimizerState]:
    """The states that are not empty, by the numbers that parameters have in a state dict."""
    return {number: state for number, state in enumerate(states) if state}


def _check_sizes(partitions: Sequence[Partition], state: OptimizerState) -> None:
    """Refuse a state of other groups."""
    saved = [len(group["params"]) for group in state["param_groups"]]
    expected = [len(partition.parameters) for partition in partitions]
    if saved != expected:
        raise ValueError(
            f"its groups have {saved} parameters, and the module's have {expected}"
        )


# The groups of DeepSpeed's optimizer


def partitions_of(optimizer: Any, placeholders: set[nn.Parameter]) -> list[Partition]:
    """Return the groups of DeepSpeed's optimizer, without placeholders."""
    partitions = []
    for parameters, group in zip(
        _parameters_by_group(optimizer), optimizer.param_groups, strict=True
    ):
        used = [p for p in parameters if p not in placeholders]
        (shard,) = group["params"]
        partitions.append(Partition(used, shard, list(map(own_span, used))))
    return partitions


def _parameters_by_group(optimizer: Any) -> Any:
    """The parameters of each group.

    DeepSpeed has two classes of optimizers, which call them differently: one is for
    bfloat16 with gradients in float32.
    """
    for name in ("bit16_groups", "bf16_groups"):
        groups = getattr(optimizer, name, None)
        if groups is not None:
            return groups
    raise StrategyError(
        f"DeepSpeed chose {type(optimizer).__name__} for its configuration, which "
        "shares nothing between the processes. Use ZeRO stage 2, or strategy='ddp'."
    )

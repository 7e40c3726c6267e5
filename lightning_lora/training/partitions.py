"""Parameter groups of which each process trains one part.

So DeepSpeed's ZeRO splits them: the parameters of a group lie end to end in one vector, and each process has an equal
part of it, a copy in float32, and the optimizer's state for that. All functions that return whole tensors must be
called by every process.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

State = dict[str, Any]


class Partition:
    """One group.

    Args:
        parameters: The parameters of the group.
        part: The part of them that this process trains.
        places: For each parameter, what it and the part share: the first number in the parameter, the first in the
            part, and how many.
    """

    def __init__(self, parameters: list[nn.Parameter], part: Tensor, places: list[tuple[int, int, int]]) -> None:
        self.parameters, self.part, self.places = parameters, part, places

    def _shared(self, values: Iterable[Tensor], part: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces that are here: of the values of each parameter, and of a part."""
        for value, (first, own, count) in zip(values, self.places, strict=True):
            yield value.reshape(-1)[first : first + count], part[own : own + count]

    def whole(self, part: Tensor, device: torch.device) -> list[Tensor]:
        """Return the values of all parameters, from all parts."""
        values = [torch.zeros(p.shape, dtype=part.dtype, device=device) for p in self.parameters]
        for value, own in self._shared(values, part):
            value.copy_(own)
        for value in values:
            dist.all_reduce(value.view(-1).view(torch.uint8))  # as bytes: a sum of numbers loses the sign of zero
        return values

    def part_of(self, values: Iterable[Tensor]) -> Tensor:
        """Return this process's part of the values of all parameters."""
        part = torch.zeros_like(self.part)
        for value, own in self._shared(values, part):
            own.copy_(value)
        return part

    def follow(self) -> None:
        """Copy the parameters, except those that are this part rounded."""
        for value, own in self._shared([p.detach() for p in self.parameters], self.part.detach()):
            now = value.to(own.device)
            own.copy_(torch.where(own.to(now.dtype) == now, own, now.to(own.dtype)))

    def whole_states(self, state: State, device: torch.device) -> list[State]:
        """Return the optimizer's state of each parameter."""
        states: list[State] = [{} for _ in self.parameters]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == self.part.shape:
                values: list[Any] = self.whole(value, device)
            else:  # one for all, as the number of steps: each gets its own
                values = [value.clone() if isinstance(value, Tensor) else value for _ in states]
            for held, each in zip(states, values, strict=True):
                held[name] = each
        return states

    def own_state(self, states: Sequence[State]) -> State:
        """Return the optimizer's state of this part.

        Raises:
            ValueError: an entry has no part of it.
        """
        found: State = {}
        for name in dict.fromkeys(name for state in states for name, value in state.items() if value is not None):
            values = [state.get(name) for state in states]
            given = [(value, p) for value, p in zip(values, self.parameters, strict=True) if value is not None]
            if all(isinstance(value, Tensor) and value.shape == p.shape for value, p in given):
                pairs = zip(values, self.parameters, strict=True)
                found[name] = self.part_of(torch.zeros_like(p) if value is None else value for value, p in pairs)
            elif any(isinstance(value, Tensor) and value.dim() for value, _ in given):
                raise ValueError(f"its entry {name!r} has other shapes than the parameters")
            else:
                found[name] = given[0][0]
        return found


def whole_state(partitions: Sequence[Partition], optimizer: Any, device: torch.device) -> State:
    """Return the state of an optimizer of the whole parameters.

    Args:
        partitions: Its groups.
        optimizer: It has one part in each group.
        device: Where the parts of all processes meet.
    """
    held: list[State] = []
    groups = []
    for partition, group in zip(partitions, optimizer.param_groups, strict=True):
        first = len(held)
        held += partition.whole_states(optimizer.state.get(partition.part, {}), device)
        rest = {name: value for name, value in group.items() if name != "params"}
        groups.append({**rest, "params": list(range(first, len(held)))})
    return {"state": {number: state for number, state in enumerate(held) if state}, "param_groups": groups}


def own_state(partitions: Sequence[Partition], state: State) -> State:
    """Return the state of an optimizer of this process's parts.

    Args:
        partitions: Its groups.
        state: The state of an optimizer of the whole parameters.

    Raises:
        ValueError: ``state`` is of other groups.
    """
    saved, own = [len(group["params"]) for group in state["param_groups"]], [len(p.parameters) for p in partitions]
    if saved != own:
        raise ValueError(f"its groups have {saved} parameters, and the module's have {own}")
    held, groups = {}, []
    for number, (partition, group) in enumerate(zip(partitions, state["param_groups"], strict=True)):
        held[number] = partition.own_state([state["state"].get(key, {}) for key in group["params"]])
        groups.append({**group, "params": [number]})
    return {"state": {number: found for number, found in held.items() if found}, "param_groups": groups}

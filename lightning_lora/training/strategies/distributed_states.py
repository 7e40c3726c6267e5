"""The state of an optimizer that a file holds in full, as each process needs it for FSDP2's sharded parameters."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from lightning_lora.tensors import shards
from lightning_lora.tensors.dicts import only
from lightning_lora.training.strategies.partitions import OptimizerState


def distributed_state(state: OptimizerState, optimizer: Any) -> OptimizerState:
    """Return an optimizer's state, in which distributed parameters have this process's shards."""
    parameters = _in_groups(optimizer.param_groups)
    numbers = _in_groups(state["param_groups"])
    if len(parameters) != len(numbers):
        return state  # torch refuses it, and says why
    by_number = dict(zip(numbers, parameters, strict=True))
    distributed = {}
    for number, p in only(by_number, state["state"]).items():
        distributed[number] = _distributed_entries(state["state"][number], p)
    return {**state, "state": distributed}


def _in_groups(groups: Iterable[OptimizerState]) -> list[Any]:
    """The parameters of an optimizer's groups, or their numbers."""
    found: list[Any] = []
    for group in groups:
        found += group["params"]
    return found


def _distributed_entries(entries: OptimizerState, p: nn.Parameter) -> OptimizerState:
    """The state of one parameter: of what has its shape, this process's shard."""
    distributed = {}
    for name, value in entries.items():
        distributed[name] = value
        if isinstance(value, Tensor) and value.shape == p.shape:
            distributed[name] = shards.distributed_as(value, p)
    return distributed

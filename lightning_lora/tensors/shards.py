"""Tensors distributed over processes.

A distributed tensor is a DTensor. It is sharded if each process holds only a part of
it, or else replicated. A call marked as collective must be made by every process, in
the same order.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_lora.private import local_offsets, tree_map

# This process's part of a tensor, and all of it


def is_dtensor(tensor: object) -> TypeGuard[Any]:
    """Whether a tensor is a DTensor, sharded or replicated."""
    # imported by whoever made one
    kind: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, kind)


def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a DTensor, which shares its memory.

    Other tensors are returned unchanged.
    """
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local.detach()


def without_dtensor(tensor: Tensor) -> Tensor:
    """Return the local tensor of a replicated DTensor.

    Gradients pass. Other tensors are returned unchanged.
    """
    if not is_dtensor(tensor) or sharding_dims(tensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local


_Value = TypeVar("_Value")


def full_tensor(value: _Value) -> _Value:
    """Return the full tensor, gathered from all processes (collective).

    Anything else is returned unchanged.
    """
    if not is_dtensor(value):
        return value
    gathered: _Value = value.detach().full_tensor()
    return gathered


def full_tensors(values: _Value) -> _Value:
    """Return containers of any depth with full tensors in them.

    Collective if there are DTensors.
    """
    gathered: _Value = tree_map(full_tensor, values)
    return gathered


# Distribute full values


def distributed_as(values: Tensor, like: Tensor | None) -> Tensor:
    """Return full values, distributed as ``like`` is, without communication.

    A DTensor is returned unchanged.
    """
    if not is_dtensor(like) or is_dtensor(values):
        return values
    from torch.distributed.tensor import distribute_tensor

    values = values.detach().to(to_local(like).device)
    # None: nothing is sent
    return distribute_tensor(
        values, like.device_mesh, like.placements, src_data_rank=None
    )


def replicated(parameter: nn.Parameter, mesh: Any) -> nn.Parameter:
    """Return a parameter as a replicated DTensor: optimizers and gradient clipping take DTensors alone, or none."""
    from torch.distributed.tensor import DTensor, Replicate

    values = DTensor.from_local(
        parameter.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False
    )
    return nn.Parameter(values, parameter.requires_grad)


# Lightning's name for the dimension of a mesh that shards matrices
TENSOR_PARALLEL = "tensor_parallel"


def sharded_as(factor: Tensor, weight: Tensor, dim: int | None) -> Tensor:
    """Return a full factor, sharded in ``dim`` if a tensor-parallel weight is sharded there.

    ``dim`` is 0 for the output of both, and -1 for the input of both. If it is None, or
    the weight is sharded in the other one, the factor is replicated. For a weight without
    tensor parallelism, it is returned unchanged.
    """
    if not is_dtensor(weight) or TENSOR_PARALLEL not in _mesh_names(weight):
        return factor
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    placement_of_weight = weight.placements[_mesh_names(weight).index(TENSOR_PARALLEL)]
    placement: Replicate | Shard = Replicate()
    if dim is not None and placement_of_weight.is_shard(dim % weight.dim()):
        placement = Shard(dim % factor.dim())
    mesh = weight.device_mesh[TENSOR_PARALLEL]
    return distribute_tensor(factor, mesh, [placement], src_data_rank=None)


# How a tensor is distributed


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only some values of a tensor."""
    return is_dtensor(tensor) and to_local(tensor).numel() < tensor.numel()


def is_sharded_over_data(tensor: Tensor) -> bool:
    """Whether a tensor is sharded over processes with different data."""
    if not is_dtensor(tensor):
        return False
    return any(_has_different_data(tensor, dim) for dim in sharding_dims(tensor))


def data_processes(tensor: Any) -> int:
    """Return the number of processes with different data that a DTensor is distributed over."""
    mesh = tensor.device_mesh
    sizes = [
        mesh.size(dim) for dim in range(mesh.ndim) if _has_different_data(tensor, dim)
    ]
    return math.prod(sizes)


def _has_different_data(tensor: Any, dim: int) -> bool:
    """Whether the processes along a dimension of a DTensor's mesh get different data."""
    return _mesh_names(tensor)[dim] != TENSOR_PARALLEL


def _mesh_names(tensor: Any) -> tuple[str, ...]:
    """The names of the dimensions of a DTensor's mesh: empty ones if it has none."""
    mesh = tensor.device_mesh
    names: tuple[str, ...] = mesh.mesh_dim_names or ("",) * mesh.ndim
    return names


def sharding_dims(tensor: Any) -> tuple[int, ...]:
    """Return the dimensions of a DTensor's mesh along which it is sharded."""
    placements = enumerate(tensor.placements)
    return tuple(dim for dim, placement in placements if not placement.is_replicate())


def is_one_run_of_values(tensor: Any) -> bool:
    """Whether the values of the local shard lie one after the other in the full tensor."""
    return all(
        placement.is_replicate() or placement.is_shard(0)
        for placement in tensor.placements
    )


def first_local(tensor: Any) -> int:
    """Return the place in the full tensor of the local shard's first element, if the shard is one run of values."""
    _, offsets = local_offsets(tensor)
    if not offsets:  # a tensor of one number
        return 0
    elements_in_a_row = tensor.shape[1:].numel()
    return int(offsets[0] * elements_in_a_row)


# In all processes


def true_anywhere(flags: Sequence[bool], tensors: Sequence[Tensor]) -> list[bool]:
    """Return which of these flags are set in any process.

    Collective if one of the tensors is a DTensor.
    """
    distributed = [tensor for tensor in tensors if is_dtensor(tensor)]
    if not distributed or not flags:
        return list(flags)
    device: str = distributed[0].device_mesh.device_type
    found = torch.tensor(flags, dtype=torch.uint8, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return list(map(bool, found.tolist()))


def reshard(model: nn.Module) -> None:
    """Let FSDP2 give up gathered parameters.

    The outermost module still shows them after an evaluation.
    """
    # imported if one is here
    sharded_class: Any = getattr(
        sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ()
    )
    for module in model.modules():
        if isinstance(module, sharded_class):
            module.reshard()

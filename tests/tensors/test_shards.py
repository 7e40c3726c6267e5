"""Tensors that are spread over processes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_lora.tensors.shards import (
    data_processes,
    distributed_as,
    first_local,
    full_tensor,
    full_tensors,
    is_dtensor,
    is_one_run_of_values,
    is_sharded,
    is_sharded_over_data,
    replicated,
    sharded_as,
    sharding_dims,
    to_local,
    true_anywhere,
    without_dtensor,
)
from tests.support.ranks import alone, has_shards, join_group, run_ranks

needs_shards = pytest.mark.skipif(
    not has_shards, reason="older versions of torch spread tensors by messages"
)


def spread(tensor: torch.Tensor, mesh: Any, placement: Any) -> Any:
    """A DTensor, made without messages."""
    return distribute_tensor(tensor, mesh, [placement], src_data_rank=None)


@needs_shards
def test_values_are_spread_as_others_are_without_their_graph() -> None:
    factor = nn.Parameter(torch.ones(4))
    with alone() as mesh:
        like = spread(torch.zeros(4), mesh, Shard(0))
        found = distributed_as(2 * factor, like)
        assert found.placements == like.placements
        assert not found.requires_grad
        assert torch.equal(found.to_local(), torch.full((4,), 2.0))


def test_plain_tensors_pass_through() -> None:
    tensor = torch.ones(2)
    assert to_local(tensor) is tensor
    assert without_dtensor(tensor) is tensor
    assert full_tensor(tensor) is tensor
    assert full_tensors({"a": [tensor, "word"]}) == {"a": [tensor, "word"]}
    assert distributed_as(tensor, None) is tensor
    assert sharded_as(tensor, tensor, 0) is tensor
    assert not is_sharded(tensor)
    assert not is_sharded_over_data(tensor)
    assert true_anywhere([True, False], [tensor]) == [True, False]


@needs_shards
def test_a_replicated_tensor_lets_gradients_pass_and_a_sharded_one_stays() -> None:
    with alone() as mesh:
        parameter = replicated(nn.Parameter(torch.ones(4)), mesh)
        local = without_dtensor(parameter)
        assert parameter.requires_grad
        assert local.requires_grad
        assert not is_dtensor(local)
        assert not to_local(parameter).requires_grad
        sharded = spread(torch.ones(4), mesh, Shard(0))
        assert without_dtensor(sharded) is sharded
        assert torch.equal(full_tensors([sharded])[0], torch.ones(4))
        assert distributed_as(sharded, parameter) is sharded


@needs_shards
@pytest.mark.parametrize(
    ("of_weight", "dim", "expected"),
    [
        (Shard(0), 0, Shard(0)),
        (Shard(1), -1, Shard(1)),
        (Shard(0), -1, Replicate()),
        (Shard(0), None, Replicate()),
    ],
)
def test_a_factor_is_split_where_its_tensor_parallel_weight_is(
    of_weight: Any, dim: int | None, expected: Any
) -> None:
    with alone() as mesh:
        weight = spread(torch.ones(4, 6), mesh, of_weight)
        factor = sharded_as(torch.ones(2, 6), weight, dim)
        assert is_dtensor(factor)
        assert factor.placements == (expected,)


@needs_shards
@pytest.mark.parametrize(
    ("name", "over_data"),
    [("tensor_parallel", False), ("data_parallel", True), (None, True)],
)
def test_shards_of_tensor_parallelism_get_the_same_data(
    name: str | None, over_data: bool
) -> None:
    with alone():
        names = None if name is None else (name,)
        named = init_device_mesh("cpu", (1,), mesh_dim_names=names)
        weight = spread(torch.ones(4, 6), named, Shard(0))
        assert is_sharded_over_data(weight) is over_data
        factor = torch.ones(2, 6)
        assert (sharded_as(factor, weight, 0) is factor) is over_data


@needs_shards
def test_one_run_of_values() -> None:
    with alone() as mesh:
        rows = spread(torch.ones(4, 6), mesh, Shard(0))
        columns = spread(torch.ones(4, 6), mesh, Shard(1))
        whole = spread(torch.ones(()), mesh, Replicate())
        assert is_one_run_of_values(rows)
        assert not is_one_run_of_values(columns)
        assert is_one_run_of_values(whole)
        assert first_local(whole) == 0
        assert (sharding_dims(rows), sharding_dims(whole)) == ((0,), ())


def parts_of_each() -> list[Any]:
    """What each of two processes knows of a tensor that is split in rows."""
    join_group()
    mesh = init_device_mesh("cpu", (2,))
    tensor = spread(torch.arange(12.0).reshape(4, 3), mesh, Shard(0))
    is_first = mesh.get_rank() == 0
    return [
        is_sharded(tensor),
        data_processes(tensor),
        first_local(tensor),
        true_anywhere([is_first, False], [tensor]),
    ]


@needs_shards
@pytest.mark.processes
def test_each_process_knows_its_part() -> None:
    assert run_ranks(parts_of_each) == [
        [True, 2, 0, [True, False]],
        [True, 2, 6, [True, False]],
    ]

"""Tensors that are spread over processes."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_lora.tensors.shards import distributed_as
from tests.support.ranks import alone, has_shards


@pytest.mark.skipif(not has_shards, reason="older versions of torch spread tensors by messages")
def test_values_are_spread_as_others_are_without_their_graph() -> None:
    factor = nn.Parameter(torch.ones(4))
    with alone() as mesh:
        like = distribute_tensor(torch.zeros(4), mesh, [Shard(0)], src_data_rank=None)
        spread = distributed_as(2 * factor, like)
        assert spread.placements == like.placements
        assert not spread.requires_grad
        assert torch.equal(spread.to_local(), torch.full((4,), 2.0))

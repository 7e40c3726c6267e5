"""The digest of a tensor that is spread over processes is that of the whole."""

import pytest
import torch
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_lora.tensors.digests import digest, digests_as
from tests.support.ranks import has_shards, join_group, run_ranks

HALVES = (torch.bfloat16, torch.float16)


def of_parts_and_whole() -> list[tuple[list[int], list[int]]]:
    join_group()
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    found = []
    for shape in ((5,), (7, 3), (1, 9), (3, 2, 2, 5), (0, 4)):
        whole = torch.randn(shape)
        parts = dtensor.distribute_tensor(whole, mesh, [dtensor.Shard(len(shape) - 1)], src_data_rank=None)
        found.append(([digest(parts), *digests_as(parts, HALVES)], [digest(whole), *digests_as(whole, HALVES)]))
    return found


@pytest.mark.skipif(not has_shards, reason="models are sharded with torch 2.7 and later")
@pytest.mark.processes
def test_digest_of_parts_is_that_of_the_whole() -> None:
    for found in run_ranks(of_parts_and_whole):
        assert all(parts == whole for parts, whole in found)

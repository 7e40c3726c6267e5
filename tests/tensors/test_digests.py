"""The digest of a tensor that is spread over processes is that of the whole."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import tensor as dtensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_lora.tensors.digests import digest
from tests.support.ranks import has_shards, join_group, run_ranks

pytestmark = [
    pytest.mark.skipif(not has_shards, reason="models are sharded with torch 2.7 and later"),
    pytest.mark.processes,
]

SHAPES = [(5,), (1, 9), (6, 5, 4), (3, 2, 2, 5), (3, 200_000), (700, 1000), (0, 4), ()]
DTYPES = [torch.bfloat16, torch.float64]


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    made = []
    for shape in SHAPES:
        values = torch.randn(shape, dtype=torch.float64) * 100
        made += [values.to(dtype) for dtype in DTYPES]
    return made


WHOLE = None
LINE = [(0,), (1,), (2,), (WHOLE,)]
SQUARE = [(0, 1), (1, 0), (2, 1), (0, 0), (WHOLE, 1), (0, WHOLE)]


def spread(shape: tuple[int, ...], splits: list[tuple[int | None, ...]]) -> list[tuple[str, int, int]]:
    """The digests of all tensors, each split in these dimensions over a mesh of this shape, and of the whole ones."""
    join_group()
    mesh = init_device_mesh("cpu", shape)
    found = []
    for tensor, dims in itertools.product(tensors(), splits):
        if any(dim is not WHOLE and dim >= tensor.dim() for dim in dims):
            continue
        placements = [dtensor.Replicate() if dim is WHOLE else dtensor.Shard(dim) for dim in dims]
        of_parts = digest(dtensor.distribute_tensor(tensor, mesh, placements, src_data_rank=None))
        found.append((f"{tuple(tensor.shape)} {tensor.dtype} {dims}", of_parts, digest(tensor)))
    return found


@pytest.mark.parametrize(("shape", "splits", "size"), [((3,), LINE, 3), ((2, 2), SQUARE, 4)])
def test_digest_of_parts_is_that_of_the_whole(shape: Any, splits: Any, size: int) -> None:
    for found in run_ranks(spread, shape, splits, size=size):
        assert len(found) > 30
        assert not [layout for layout, of_parts, of_whole in found if of_parts != of_whole]

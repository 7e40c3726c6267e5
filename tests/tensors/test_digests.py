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
    pytest.mark.skipif(
        not has_shards, reason="models are sharded with torch 2.7 and later"
    ),
    pytest.mark.processes,
]

SHAPES = [(5,), (1, 9), (6, 5, 4), (3, 2, 2, 5), (3, 200_000), (700, 1000), (0, 4), ()]


# for each dimension of a mesh, that of the tensor which is split over it
Splits = tuple[int | None, ...]


def tensors() -> list[Tensor]:
    torch.manual_seed(0)
    made = []
    for shape in SHAPES:
        values = torch.randn(shape, dtype=torch.float64) * 100
        made.append(values.bfloat16())
        made.append(values)
    return made


WHOLE = None
LINE = [(0,), (1,), (2,), (WHOLE,)]
SQUARE = [(0, 1), (1, 0), (2, 1), (0, 0), (WHOLE, 1), (0, WHOLE)]


def has_dimensions(tensor: Tensor, dims: Splits) -> bool:
    """Whether the tensor has all these dimensions."""
    return all(dim < tensor.dim() for dim in dims if dim is not WHOLE)


def placement(dim: int | None) -> dtensor.Placement:
    if dim is WHOLE:
        return dtensor.Replicate()
    return dtensor.Shard(dim)


def spread(shape: tuple[int, ...], splits: list[Splits]) -> list[tuple[str, int, int]]:
    """The digests of all tensors, each split in these dimensions over a mesh of this shape, and of the whole ones."""
    join_group()
    mesh = init_device_mesh("cpu", shape)
    found = []
    for tensor, dims in itertools.product(tensors(), splits):
        if not has_dimensions(tensor, dims):
            continue
        placements = [placement(dim) for dim in dims]
        parts = dtensor.distribute_tensor(tensor, mesh, placements, src_data_rank=None)
        layout = f"{tuple(tensor.shape)} {tensor.dtype} {dims}"
        found.append((layout, digest(parts), digest(tensor)))
    return found


@pytest.mark.parametrize(
    ("shape", "splits", "size"), [((3,), LINE, 3), ((2, 2), SQUARE, 4)]
)
def test_digest_of_parts_is_that_of_the_whole(
    shape: Any, splits: Any, size: int
) -> None:
    for found in run_ranks(spread, shape, splits, size=size):
        assert len(found) > 30
        for layout, of_parts, of_whole in found:
            assert of_parts == of_whole, layout

"""Go through a matrix in blocks of rows, whose intermediate results stay in the cache."""

from collections.abc import Iterator

from torch import Tensor

_ON_CPU, _ON_DEVICE = 1 << 18, 1 << 26  # elements of a block


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix in blocks.

    In float32, each has a megabyte on a CPU, 256 megabytes elsewhere.
    """
    rows, width = matrix.shape
    elements = _ON_CPU if matrix.device.type == "cpu" else _ON_DEVICE
    step = max(1, elements // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))

"""Dropout that keeps no mask: where it drops is drawn anew, from a seed, whenever it is needed."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_lora.functional.blocks import row_blocks


def new_seed() -> int:
    """Draw a seed from torch's generator, so that ``torch.manual_seed`` reproduces what follows from it.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> first, second = new_seed(), new_seed()
        >>> _ = torch.manual_seed(0)
        >>> new_seed() == first, first == second
        (True, False)
    """
    return int(torch.randint(1 << 62, (), device="cpu"))


def drops(rows: Tensor, p: float, seed: int) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
    r"""Drop elements of a matrix, each with probability ``p`` and independently of all others, block by block.

    On a CPU, random numbers are what dropout costs. The number of elements that are kept between two dropped ones is
    geometric, :math:`P(k) = (1 - p)^k p`, and drawing these numbers instead takes only ``p`` draws an element. The
    process has no memory, so that each block may start it anew.

    Args:
        rows: A matrix, of which only the shape and the device matter.
        p: The probability, in (0, 1).
        seed: The same seed drops the same elements, whenever it is asked.

    Yields:
        The rows of a block, and a function that sets to zero, in place, what is dropped of a contiguous matrix like it.

    Source:
        Batagelj and Brandes 2005, "Efficient Generation of Large Random Networks", section II (the geometric numbers).

    Example:
        >>> rows = torch.ones(1000, 100)
        >>> for block, drop in drops(rows, p=0.25, seed=0):
        ...     _ = drop(rows[block])
        >>> round(float(rows.mean()), 2)
        0.75
    """
    generator = torch.Generator(rows.device).manual_seed(seed)
    for block in row_blocks(rows):
        shape = rows[block].shape
        if rows.device.type == "cpu":
            places = _by_gaps(shape.numel(), p, generator)
            yield block, partial(_zero_places, places=places)
        else:
            mask = torch.rand(shape, dtype=torch.float32, device=rows.device, generator=generator) < p
            yield block, partial(Tensor.masked_fill_, mask=mask, value=0)


def _zero_places(matrix: Tensor, places: Tensor) -> Tensor:
    matrix.view(-1).index_fill_(0, places, 0)
    return matrix


def _by_gaps(size: int, p: float, generator: torch.Generator) -> Tensor:
    """Places in ``range(size)``, in order."""
    found, last = [], -1
    while last < size:
        expected = (size - last) * p
        draws = int(expected + 5 * math.sqrt(expected) + 8)
        uniform = torch.empty(draws, dtype=torch.float32, device="cpu").uniform_(generator=generator)
        gaps = uniform.neg_().log1p_().mul_(1 / math.log1p(-p)).long().add_(1)
        gaps[0] += last
        places = gaps.cumsum(0)
        found.append(places)
        last = int(places[-1])
    found[-1] = found[-1][: int(torch.searchsorted(found[-1], size))]
    return found[0] if len(found) == 1 else torch.cat(found)

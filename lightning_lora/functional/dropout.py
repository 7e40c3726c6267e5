"""Dropout that stores a seed instead of a mask: the backward pass draws the same positions again."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from lightning_lora.functional.row_blocks import row_blocks


def new_seed() -> int:
    """Draw a seed from torch's generator, so that ``torch.manual_seed`` makes the dropout reproducible."""
    return int(torch.randint(1 << 62, (), device="cpu"))


def drops(
    rows: Tensor, p: float, seed: int
) -> Iterator[tuple[slice, Callable[[Tensor], Tensor]]]:
    r"""Yield blocks of rows, each with a function that drops elements in place.

    Such a function takes a contiguous matrix of the block's shape. Each element is
    dropped with probability ``p`` in (0, 1), and always the same ones for the same
    seed.

    On a CPU, drawing random numbers is the main cost of dropout. The number of kept
    elements between two dropped ones has a geometric distribution, :math:`P(k) = (1 -
    p)^k p`. Drawing these gaps takes only ``p`` random numbers per element. The
    distribution has no memory, so each block can start with a new gap.

    Source:
        Batagelj and Brandes 2005, "Efficient Generation of Large Random Networks",
        section II (the geometric gaps).
    """
    generator = torch.Generator(rows.device).manual_seed(seed)
    for block in row_blocks(rows):
        shape = rows[block].shape
        if rows.device.type == "cpu":
            places = _by_gaps(shape.numel(), p, generator)
            yield block, partial(_zero_places, places=places)
        else:
            mask = (
                torch.rand(
                    shape, dtype=torch.float32, device=rows.device, generator=generator
                )
                < p
            )
            yield block, partial(Tensor.masked_fill_, mask=mask, value=0)


def _zero_places(matrix: Tensor, places: Tensor) -> Tensor:
    matrix.view(-1).index_fill_(0, places, 0)
    return matrix


def _by_gaps(size: int, p: float, generator: torch.Generator) -> Tensor:
    """The places of the dropped elements in ``range(size)``, in increasing order."""
    found: list[Tensor] = []
    last = -1
    while last < size:
        expected = (size - last) * p
        # so many that one round is nearly always enough
        draws = int(expected + 5 * math.sqrt(expected) + 8)
        uniform = torch.empty(draws, dtype=torch.float32, device="cpu").uniform_(
            generator=generator
        )
        gaps = uniform.neg_().log1p_().mul_(1 / math.log1p(-p)).long()
        steps = gaps.add_(1)  # from one dropped element to the next
        steps[0] += last
        places = steps.cumsum(0)
        found.append(places)
        last = int(places[-1])
    # the last round went beyond the end: keep those of its places that are inside
    inside = int(torch.searchsorted(places, size))
    found[-1] = places[:inside]
    return found[0] if len(found) == 1 else torch.cat(found)

"""Tell initial values of a weight from trained ones.

Initialisations draw every value from the same uniform or normal distribution. In a trained weight, the range, the
deviation or the shape of the distribution is another one, or some rows or columns are larger than others. A weight
looks drawn only if it passes all of these tests.
"""

import math

import torch
from torch import Tensor

FEWEST = 256
"""With fewer values than this, a trained weight may look drawn by chance."""

_MOST = 10_000
"""The number of values that are tested in a large weight."""

_ROUNDING = 0.004
"""The relative error of bfloat16."""

_SPREAD = 4.0
"""How many standard errors a moment may be away from its expected value."""


def block_of(weight: Tensor) -> Tensor:
    """Return rows and columns of a weight to test.

    They are evenly spaced, with about 10,000 values. Rows of zeros (padding) are left out.

    Shape:
        ``weight``: (rows, ...). Returns (some rows, some columns), in float32 on the CPU.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    most_rows = min(rows, max(100, _MOST // columns))
    columns_taken = min(columns, _MOST // most_rows)
    some = weight.detach()[_spaced(rows, most_rows, weight.device)].flatten(1)
    block = some[:, _spaced(columns, columns_taken, weight.device)].float().cpu()
    return block[block.any(1)]


def _spaced(length: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) * length // count


def is_uniform(block: Tensor, bound: float) -> bool:
    """Whether the values look drawn uniformly from [-bound, bound].

    Example:
        >>> fresh = torch.nn.Linear(64, 64).weight
        >>> is_uniform(block_of(fresh), 1 / 8), is_uniform(block_of(fresh + 0.01 * fresh.sign()), 1 / 8)
        (True, False)
    """
    count, largest = block.numel(), block.abs().max().item()
    if not (1 - 10 / count - _ROUNDING) * bound <= largest <= (1 + _ROUNDING) * bound:
        return False
    return _distance((block / bound + 1) / 2) <= 2.2 / math.sqrt(count) and _is_even(block)


def is_normal(block: Tensor, deviation: float) -> bool:
    """Whether the values look drawn normally, around zero.

    Example:
        >>> fresh = torch.randn(100, 100)
        >>> is_normal(block_of(fresh), 1.0), is_normal(block_of(fresh), 0.9), is_normal(block_of(fresh**3), 3.9)
        (True, False, False)
    """
    count, scaled = block.numel(), block / deviation
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        if abs(scaled.pow(power).mean().item() - moment) > _SPREAD * math.sqrt(variance / count):
            return False
    return _distance(torch.special.ndtr(scaled)) <= 2 / math.sqrt(count) and _is_even(block)


def _distance(probabilities: Tensor) -> float:
    """The Kolmogorov-Smirnov distance of these values to a uniform distribution over [0, 1]."""
    ordered = probabilities.flatten().sort().values
    count = len(ordered)
    below = torch.arange(count) / count
    return max((ordered - below).max().item(), (below + 1 / count - ordered).max().item())


def _is_even(block: Tensor) -> bool:
    """Whether no row and no column is larger or smaller than chance makes it."""
    squares = block.square()
    for sums, length in ((squares.sum(1), squares.shape[1]), (squares.sum(0), squares.shape[0])):
        if len(sums) > 1:
            ratio = sums.var().item() / (length * squares.var().item())
            part = 2 / (9 * (len(sums) - 1))  # the cube root of a chi-squared value is nearly normal (Wilson, Hilferty)
            if ratio > (1 - part + _SPREAD * math.sqrt(part)) ** 3:
                return False
    return True

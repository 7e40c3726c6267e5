"""Whether values look drawn at random, as an initialisation draws them: from one uniform or normal distribution."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

_TESTED = 10_000  # values that are tested in a large weight
_ROUNDING = 0.004  # the relative error of bfloat16
_SPREAD = 4.0  # how many standard errors a moment may be away from its expected value


class _Moment(NamedTuple):
    """What a power of a value drawn at random is: its mean, and its variance."""

    power: int
    mean: float
    variance: float


_OF_UNIFORM = (
    _Moment(1, 0, 1 / 3),
    _Moment(2, 1 / 3, 4 / 45),
    _Moment(3, 0, 1 / 7),
    _Moment(4, 1 / 5, 16 / 225),
)
"""Of a value drawn uniformly from [-1, 1]."""

_OF_NORMAL = (
    _Moment(1, 0, 1),
    _Moment(2, 1, 2),
    _Moment(3, 0, 15),
    _Moment(4, 3, 96),
    _Moment(6, 15, 10170),
)
"""Of a value drawn normally, with mean 0 and standard deviation 1."""


def block_of(weight: Tensor) -> Tensor:
    """Return evenly spaced rows and columns of a weight, without zero rows (padding).

    These are about 10,000 values.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    rows_taken = min(rows, max(100, _TESTED // columns))
    columns_taken = min(columns, _TESTED // rows_taken)
    some_rows = weight.detach()[_spaced(rows, rows_taken, weight.device)].flatten(1)
    block = some_rows[:, _spaced(columns, columns_taken, weight.device)].float().cpu()
    return block[block.any(1)]


def _spaced(length: int, count: int, device: torch.device) -> Tensor:
    """Evenly spaced places in a dimension."""
    return torch.arange(count, device=device) * length // count


def is_uniform(block: Tensor, bound: float) -> bool:
    """Whether the values look drawn uniformly from [-bound, bound]."""
    largest = block.abs().max().item() / bound
    # the largest of so many values is hardly ever below this
    expected = 1 - 10 / block.numel()
    reaches_bound = expected - _ROUNDING <= largest <= 1 + _ROUNDING
    return reaches_bound and _has_moments(block / bound, _OF_UNIFORM)


def is_normal(block: Tensor, deviation: float) -> bool:
    """Whether the values look drawn normally, around zero."""
    return _has_moments(block / deviation, _OF_NORMAL) and _is_even(block)


def _has_moments(scaled: Tensor, moments: tuple[_Moment, ...]) -> bool:
    """Whether the means of the values' powers are as near to the expected ones as chance allows."""
    for moment in moments:
        mean = scaled.pow(moment.power).mean().item()
        standard_error = math.sqrt(moment.variance / scaled.numel())
        is_near = abs(mean - moment.mean) <= _SPREAD * standard_error  # never for NaN
        if not is_near:
            return False
    return True


def _is_even(block: Tensor) -> bool:
    """Whether rows, and columns, differ in size only by chance.

    Those of a trained weight differ more.
    """
    squares = block.square()
    return _are_even(squares, dim=1) and _are_even(squares, dim=0)


def _are_even(squares: Tensor, dim: int) -> bool:
    """Whether the sums over a dimension differ only by chance."""
    sums = squares.sum(dim)
    if len(sums) <= 1:
        return True
    expected = squares.shape[dim] * squares.var()
    ratio = (sums.var() / expected).item()  # NaN if all are equal
    # a chi-squared value's cube root is nearly normal (Wilson, Hilferty)
    variance = 2 / (9 * (len(sums) - 1))
    largest = (1 - variance + _SPREAD * math.sqrt(variance)) ** 3
    return not ratio > largest  # NaN is even

"""How sure a difference is: the paired bootstrap over items and seeds."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

Values = np.ndarray  # of shape (seeds, items, numbers of each item)
# of means over items: its last dimension is the numbers
Statistic = Callable[[np.ndarray], np.ndarray]

RESAMPLES = 10_000
SIMULATIONS = 400
RESAMPLES_OF_A_SIMULATION = 400


class Difference(NamedTuple):
    """A difference of two methods, the ends of its 95 % interval, and twice the share of resamples across zero."""

    found: float
    low: float
    high: float
    p: float

    @property
    def is_resolved(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0 <= self.high


def interval(
    one: Values, other: Values, statistic: Statistic, resamples: int = RESAMPLES
) -> Difference:
    """Return the difference of two methods.

    Items are drawn with replacement, the same ones for both methods, and so are seeds.

    Source:
        Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation",
        section 4.
    """
    found = over_seeds(one, statistic) - over_seeds(other, statistic)
    redrawn = resampled(one, statistic, resamples) - resampled(
        other, statistic, resamples
    )
    low, high = np.percentile(redrawn, [2.5, 97.5])
    across_zero = min((redrawn <= 0).mean(), (redrawn >= 0).mean())
    p = max(2 * float(across_zero), 2 / resamples)
    return Difference(float(found), float(low), float(high), p)


def over_seeds(values: Values, statistic: Statistic) -> float:
    """Return the mean over seeds of a statistic."""
    of_seeds = statistic(values.mean(1))
    return float(of_seeds.mean())


def survivors(p: list[float], level: float = 0.05) -> list[bool]:
    """Return which of several comparisons are still resolved together.

    Source:
        Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure".
    """
    survives = [False] * len(p)
    places = sorted(range(len(p)), key=p.__getitem__)
    for rank, place in enumerate(places):
        if p[place] > level / (len(p) - rank):
            break
        survives[place] = True
    return survives


def resampled(values: Values, statistic: Statistic, resamples: int) -> np.ndarray:
    """Return the mean over seeds of a statistic, for each resample."""
    shares, seeds = drawn(*values.shape[:2], resamples)
    # (resamples, seeds, numbers)
    means = np.stack([shares @ of_seed for of_seed in values], axis=1)
    redrawn_seeds = np.take_along_axis(statistic(means), seeds, axis=1)
    found: np.ndarray = redrawn_seeds.mean(1)
    return found


@cache
def drawn(seeds: int, items: int, resamples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of each item in each resample, and the seeds of each: the same ones for all methods."""
    draw = np.random.default_rng(0)
    counts = []
    for _ in range(resamples):
        numbers = draw.integers(items, size=items)
        counts.append(np.bincount(numbers, minlength=items))
    shares = np.stack(counts) / items
    return shares, draw.integers(seeds, size=(resamples, seeds))


def coverage(one: Values, other: Values, statistic: Statistic) -> float:
    """Return in which share of studies the interval holds the true difference of two methods.

    What was found is taken for the truth. Each simulated study draws its seeds and its
    items from it, and makes an interval of them. A new training has another seed for
    each method, so the seeds of the two are drawn apart.

    Source:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 18.3
        (calibration).
    """
    truth = over_seeds(one, statistic) - over_seeds(other, statistic)
    seeds, items = one.shape[:2]
    draw = np.random.default_rng(0)
    holds = []
    for _ in range(SIMULATIONS):
        of_items = draw.integers(items, size=items)
        seeds_of_one = draw.integers(seeds, size=seeds)
        seeds_of_other = draw.integers(seeds, size=seeds)
        simulated_one = one[seeds_of_one][:, of_items]
        simulated_other = other[seeds_of_other][:, of_items]
        found = interval(
            simulated_one, simulated_other, statistic, RESAMPLES_OF_A_SIMULATION
        )
        holds.append(found.low <= truth <= found.high)
    return float(np.mean(holds))


def average(means: np.ndarray) -> np.ndarray:
    """Return the only number."""
    return means[..., 0]


def bleu(means: np.ndarray) -> np.ndarray:
    """Return corpus BLEU from the counts of each item."""
    counts, totals, lengths = np.split(means, [4, 8], axis=-1)
    # no match or no text: a logarithm is minus infinity, and BLEU is 0
    with np.errstate(divide="ignore"):
        precisions = counts / np.where(counts, totals, 1)
        precision = np.exp(np.log(precisions).mean(-1))
        brevity = np.minimum(0, 1 - lengths[..., 1] / lengths[..., 0])
    found: np.ndarray = 100 * precision * np.exp(brevity)
    return found


def share(means: np.ndarray) -> np.ndarray:
    """Return the first number over the second, in per cent."""
    counts, totals = means[..., 0], means[..., 1]
    found: np.ndarray = 100 * counts / totals
    return found

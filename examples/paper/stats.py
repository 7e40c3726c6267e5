"""How sure a difference is: the paired bootstrap over items and seeds."""

from collections.abc import Callable

import numpy as np

Values = np.ndarray  # of shape (seeds, items, numbers of each item)
Statistic = Callable[[np.ndarray], float]  # of the means over items, of shape (numbers,)

RESAMPLES = 2000


def interval(one: Values, other: Values, statistic: Statistic) -> tuple[float, float, float]:
    """Return the difference of two methods, and the ends of its 95 % interval.

    Items are drawn with replacement, the same ones for both methods, and so are seeds.

    Source:
        Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 4.
    """
    draw = np.random.default_rng(0)
    seeds, items = one.shape[:2]
    found = []
    for _ in range(RESAMPLES):
        shares = np.bincount(draw.integers(items, size=items), minlength=items) / items
        pairs = draw.integers(seeds, size=seeds)
        found.append(over_seeds(shares @ one[pairs], statistic) - over_seeds(shares @ other[pairs], statistic))
    low, high = np.percentile(found, [2.5, 97.5])
    return over_seeds(one.mean(1), statistic) - over_seeds(other.mean(1), statistic), float(low), float(high)


def over_seeds(means: np.ndarray, statistic: Statistic) -> float:
    """Return the mean of a statistic over seeds."""
    return sum(map(statistic, means)) / len(means)


def average(means: np.ndarray) -> float:
    """Return the only number."""
    return float(means.item())


def bleu(means: np.ndarray) -> float:
    """Return corpus BLEU from the counts of each item."""
    counts, totals, lengths = np.split(means, [4, 8])
    if not counts.all():
        return 0.0
    brevity = min(0.0, 1 - lengths[1] / lengths[0])
    return float(100 * np.exp(np.log(counts / totals).mean() + brevity))


def share(means: np.ndarray) -> float:
    """Return the first number over the second, in per cent."""
    first, second = means
    return float(100 * first / second)

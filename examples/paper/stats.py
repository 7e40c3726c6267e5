"""How sure a difference is: the paired bootstrap over items and seeds."""

from collections.abc import Callable

import numpy as np

Values = np.ndarray  # of shape (seeds, items, numbers of each item)
Statistic = Callable[[Values], float]  # of shape (items, numbers)

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
        chosen = draw.integers(items, size=items)
        pairs = draw.integers(seeds, size=seeds)
        found.append(mean(one[pairs][:, chosen], statistic) - mean(other[pairs][:, chosen], statistic))
    low, high = np.percentile(found, [2.5, 97.5])
    return mean(one, statistic) - mean(other, statistic), float(low), float(high)


def mean(values: Values, statistic: Statistic) -> float:
    """Return the mean of a statistic over seeds."""
    return float(np.mean([statistic(seed) for seed in values]))


def average(items: Values) -> float:
    """Return the mean over items."""
    return float(items.mean())


def bleu(items: Values) -> float:
    """Return corpus BLEU from the counts of each item."""
    counts, totals, lengths = np.split(items.sum(0), [4, 8])
    if not counts.all():
        return 0.0
    brevity = min(0.0, 1 - lengths[1] / lengths[0])
    return float(100 * np.exp(np.log(counts / totals).mean() + brevity))


def share(items: Values) -> float:
    """Return the first number over the second, summed over items, in per cent."""
    first, second = items.sum(0)
    return float(100 * first / second)

"""What the cells of the tables hold: numbers of jobs, and their differences."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import stats
from .jobs import Job, Results, nll
from .plan import finalists, loss, ranked, search, seeds

WHOLE = "\N{NO-BREAK SPACE}"
"""What stands in a cell where a narrow screen must not break a line."""


@dataclass(frozen=True)
class Measure:
    """What tables compare of two methods.

    Args:
        keys: The numbers of each item that it needs.
        statistic: Makes one number of their means.
        factor: What the difference is multiplied by.
        digits: How many of them a cell shows.
    """

    keys: tuple[str, ...]
    statistic: stats.Statistic
    factor: float = 1
    digits: int = 1


ACCURACY = Measure(("correct",), stats.average, factor=100)
LOSS = Measure(("nll",), stats.average, digits=3)
BLEU = Measure(("bleu",), stats.bleu)
WRONG_SLOTS = Measure(("wrong_slots", "slots"), stats.share)


def items(result: dict[str, Any], *keys: str, sets: Iterable[str] = ()) -> np.ndarray:
    """Return numbers of each item of the test part, or of these parts, of shape (items, numbers)."""
    of_parts = []
    for part in sets or ["test"]:
        columns = [np.array(result[part][key], dtype=float) for key in keys]
        of_parts.append(np.column_stack(columns))
    return np.concatenate(of_parts)


def mean_of(results: Results, jobs: list[Job], key: str) -> float:
    """Return the mean over jobs of a number that each has."""
    return float(np.mean([results[job][key] for job in jobs]))


def accuracy(results: Results, jobs: list[Job], *sets: str) -> str:
    """Return the mean accuracy on the test part, or on these parts, in per cent."""
    of_jobs = [items(results[job], "correct", sets=sets).mean() for job in jobs]
    return f"{100 * float(np.mean(of_jobs)):.1f}"


def rate(jobs: list[Job]) -> str:
    """Return the learning rate of some jobs, or a dash if nothing was trained."""
    return f"{jobs[0].lr:g}" if jobs[0].lr else "–"


def trained(results: Results, jobs: list[Job]) -> str:
    """Return how many parameters trained."""
    return f"{results[jobs[0]]['trained']:,}"


def differences(
    results: Results, jobs: list[Job], others: list[Job], *sets: str
) -> list[str]:
    """Return the differences of accuracy, in points, and of loss, on the test part or on these parts together."""
    return [
        difference(results, jobs, others, measure, *sets)
        for measure in (ACCURACY, LOSS)
    ]


def difference(
    results: Results, jobs: list[Job], others: list[Job], measure: Measure, *sets: str
) -> str:
    """Return a difference with its interval, bold if that leaves out zero; rounding decides nothing."""
    if jobs == others:
        return ""
    known = (jobs[0].name, others[0].name, measure.keys[0], *sets)
    if known not in results.compared:
        one = of_seeds(results, jobs, measure, sets)
        other = of_seeds(results, others, measure, sets)
        results.compared[known] = stats.interval(one, other, measure.statistic)
    exact = results.compared[known]
    found, low, high = (
        signed(measure.factor * value, measure.digits) for value in exact[:3]
    )
    text = f"{found} [{low},{WHOLE}{high}]"
    return f"**{text}**" if exact.is_resolved else text


def of_seeds(
    results: Results, jobs: list[Job], measure: Measure, sets: Iterable[str]
) -> stats.Values:
    """Return what a measure needs of each job, one for each seed."""
    return np.stack([items(results[job], *measure.keys, sets=sets) for job in jobs])


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, and with one more digit if it would be rounded to zero."""
    if value and not round(value, digits):
        digits += 1
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # -0.0 becomes 0.0


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """Return a table in Markdown. Numbers stand on the right."""
    line = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(map(markdown_row, [header, line, *rows]))


def markdown_row(cells: list[Any]) -> str:
    """Return a line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def rates_of(results: Results, task: str, name: str, epochs: int) -> str:
    """Return each learning rate with its loss, and with the mean over seeds where that decided; the best is bold."""
    jobs = search(results, task, name, epochs)
    tried = {}
    for job in jobs:
        tried[job] = f"{job.lr:g}:{WHOLE}{nll(results[job]):.3f}"
    best = ranked(results, jobs)[0]
    last = finalists(results, task, name, epochs)
    if len(last) > 1:
        for jobs in last:
            tried[jobs[0]] += f"{WHOLE}({loss(results, jobs):.3f})"
        best = seeds(results, task, name, epochs)[0]
    return listed(tried, best)


def listed(tried: dict[Job, str], best: Job) -> str:
    """Return the texts of some jobs in one line, that of the best in bold."""
    texts = [f"**{text}**" if job == best else text for job, text in tried.items()]
    return ", ".join(texts)

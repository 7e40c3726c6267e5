"""What the cells of the tables hold: numbers of jobs, and their differences."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from . import stats
from .jobs import Job, Results, nll
from .plan import finalists, loss, ranked, search, seeds

WHOLE = "\N{NO-BREAK SPACE}"
"""What stands in a cell where a narrow screen must not break a line."""


def accuracy(results: Results, jobs: list[Job], *sets: str) -> float:
    """Return the mean accuracy on the test part, or on these parts, in per cent."""
    return 100 * float(np.mean([items(results[job], "correct", sets=sets).mean() for job in jobs]))


def items(result: dict[str, Any], *keys: str, sets: Iterable[str] = ()) -> np.ndarray:
    """Return numbers of each item of the test part, or of these parts, of shape (items, numbers)."""
    each = [np.column_stack([np.array(result[part][key], dtype=float) for key in keys]) for part in sets or ["test"]]
    return np.concatenate(each)


def differences(results: Results, jobs: list[Job], others: list[Job], *sets: str) -> list[str]:
    """Return the differences of accuracy, in points, and of loss, on the test part or on these parts together."""
    points = difference(results, jobs, others, ["correct"], stats.average, 100, 1, *sets)
    return [points, difference(results, jobs, others, ["nll"], stats.average, 1, 3, *sets)]


def difference(
    results: Results,
    jobs: list[Job],
    others: list[Job],
    keys: list[str],
    statistic: stats.Statistic,
    factor: float,
    digits: int,
    *sets: str,
) -> str:
    """Return a difference with its interval, bold if that leaves out zero; rounding decides nothing."""
    if jobs == others:
        return ""
    known = (jobs[0].name, others[0].name, keys[0], *sets)
    if known not in results.compared:
        one, other = (np.stack([items(results[job], *keys, sets=sets) for job in each]) for each in (jobs, others))
        results.compared[known] = stats.interval(one, other, statistic)
    exact = results.compared[known]
    found, low, high = (signed(factor * value, digits) for value in exact[:3])
    text = f"{found} [{low},{WHOLE}{high}]"
    return f"**{text}**" if exact.is_resolved else text


def signed(value: float, digits: int) -> str:
    """Return a number with its sign, and with one more digit if it would be rounded to zero."""
    if value and not round(value, digits):
        digits += 1
    return f"{round(value, digits) + 0.0:+.{digits}f}"  # -0.0 becomes 0.0


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """Return a table in Markdown. Numbers stand on the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def rates_of(results: Results, task: str, name: str, epochs: int) -> str:
    """Return each learning rate with its loss, and with the mean over seeds where that decided; the best is bold."""
    jobs = search(results, task, name, epochs)
    tried = {job: f"{job.lr:g}:{WHOLE}{nll(results[job]):.3f}" for job in jobs}
    best, *_ = ranked(results, jobs)
    if len(last := finalists(results, task, name, epochs)) > 1:
        for of_seeds in last:
            tried[of_seeds[0]] += f"{WHOLE}({loss(results, of_seeds):.3f})"
        best, *_ = seeds(results, task, name, epochs)
    tried[best] = f"**{tried[best]}**"
    return ", ".join(tried.values())

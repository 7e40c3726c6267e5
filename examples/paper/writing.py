"""Tables of E2E: how well methods write."""

from typing import Any

import numpy as np

from . import stats
from .cells import (
    BLEU,
    WRONG_SLOTS,
    difference,
    items,
    markdown,
    mean_of,
    rate,
    trained,
)
from .jobs import Job, Results, nll
from .methods import E2E
from .plan import PROMPT_JOBS, best_prompt, seeds


def written(results: Results) -> str:
    """BLEU and the other measures on E2E, each seed shown, and differences to full fine-tuning."""
    best = seeds(results, "e2e", "full")
    jobs_of = [best_prompt(results), *(seeds(results, "e2e", name) for name in E2E)]
    rows = [row(results, jobs, best) for jobs in jobs_of]
    people = results.found["references"]
    wrong = 100 * people["wrong_slots"] / people["slots"]
    rows.append(["people", *"–" * 6, f"{wrong:.1f}", *"–" * 3])
    measured = [
        "BLEU",
        "seeds",
        "minus full",
        "NIST",
        "ROUGE-L",
        "slots wrong, %",
        "minus full",
        "trained",
        "own task",
    ]
    return markdown(["method", "rate", *measured], rows)


def row(results: Results, jobs: list[Job], best: list[Job]) -> list[Any]:
    """Return what was measured of the texts of a method."""
    bleu, wrong, rouge = [], [], []
    for job in jobs:
        bleu.append(stats.bleu(mean_item(results, job, "bleu")))
        wrong.append(stats.share(mean_item(results, job, "wrong_slots", "slots")))
        rouge.append(mean_item(results, job, "rouge_l"))
    return [
        jobs[0].method,
        rate(jobs),
        f"{np.mean(bleu):.1f}",
        " ".join(map("{:.1f}".format, bleu)),
        difference(results, jobs, best, BLEU),
        f"{mean_of(results, jobs, 'nist'):.2f}",
        f"{100 * np.mean(rouge):.1f}",
        f"{np.mean(wrong):.1f}",
        difference(results, jobs, best, WRONG_SLOTS),
        trained(results, jobs),
        f"{mean_of(results, jobs, 'own_task'):.2f}",
    ]


def mean_item(results: Results, job: Job, *keys: str) -> np.ndarray:
    """Return the mean over items of their numbers."""
    mean: np.ndarray = items(results[job], *keys).mean(0)
    return mean


def prompted(results: Results) -> str:
    """Loss of each prompt on E2E's validation part."""
    best = best_prompt(results)[0].method
    rows = []
    for job in PROMPT_JOBS:
        loss = f"{nll(results[job]):.3f}"
        if job.method == best:
            loss = f"**{loss}**"
        rows.append([job.method, loss])
    return markdown(["", "loss"], rows)

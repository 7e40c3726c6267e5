"""The table that says how often the intervals of the other tables hold the truth."""

from .cells import ACCURACY, BLEU, LOSS, Measure, markdown, of_seeds
from .jobs import Job, Results, nll
from .plan import at_best_with_few, best_prompt, seeds
from .stats import coverage


def coverages(results: Results) -> str:
    """In how many simulated studies the interval holds the difference to full fine-tuning that was found."""
    rows = []
    for title, measure, jobs, full in compared(results):
        one = of_seeds(results, jobs, measure, ())
        other = of_seeds(results, full, measure, ())
        share = coverage(one, other, measure.statistic)
        percent = 100 * share
        rows.append([title, f"{percent:.0f} %"])
    header = ["an interval of", "holds the truth in"]
    return markdown(header, rows)


def compared(results: Results) -> list[tuple[str, Measure, list[Job], list[Job]]]:
    """Return the differences of each kind: what it is called, its measure, the jobs, and those of full fine-tuning."""
    all_linear, everything = "LoRA all, r=8", "LoRA everything, r=8"
    rows = []
    for task in ("reviews", "definitions"):
        full = seeds(results, task, "full")
        jobs = seeds(results, task, all_linear)
        rows.append((f"{task}: {all_linear}, accuracy", ACCURACY, jobs, full))
        rows.append((f"{task}: {all_linear}, loss", LOSS, jobs, full))
    full = at_best_with_few(results, "reviews-100", "full", nll)
    for name in (all_linear, everything):
        jobs = at_best_with_few(results, "reviews-100", name, nll)
        rows.append((f"100 texts: {name}, accuracy", ACCURACY, jobs, full))
    full = seeds(results, "e2e", "full")
    for name in (all_linear, everything):
        rows.append((f"E2E: {name}, BLEU", BLEU, seeds(results, "e2e", name), full))
    rows.append(("E2E: the best prompt, BLEU", BLEU, best_prompt(results), full))
    return rows

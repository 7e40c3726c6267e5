"""Which jobs each part of the study needs, given those that are finished."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain
from statistics import mean

from .jobs import Job, Results, nll
from .methods import (
    BEYOND,
    DEFINITIONS,
    E2E,
    EPOCHS,
    EVERYTHING,
    FEW,
    FEW_EPOCHS,
    GRID,
    GRID_RATES,
    MAIN,
    METHODS,
    PREFIX,
    PROMPTS,
    RANKS,
    RATE,
    VARIANTS,
    WHICH,
    WHOLE,
)


def search(results: Results, task: str, name: str, epochs: int = 2) -> list[Job]:
    """Return the jobs of one seed that choose a method's learning rate: three, and one more where the edge wins.

    With four epochs, the search begins with the best rate of two, and half of it. With few texts, which have low rates,
    it may go on by two more.
    """
    rates = METHODS[name].rates
    if epochs == 4:
        best = seeds(results, task, name, 2)[0].lr
        rates = (best / 2, best)
    jobs = [Job(task, name, lr, epochs=epochs) for lr in rates]
    if results.fast or len(jobs) == 1:
        return jobs[:1]
    for _ in range(3 if task in FEW_EPOCHS else 1):
        if not all(job in results for job in jobs):
            break
        best = jobs.index(ranked(results, jobs)[0])
        if best == 0:
            jobs.insert(0, replace(jobs[0], lr=jobs[0].lr / 2))
        elif best == len(jobs) - 1:
            jobs.append(replace(jobs[-1], lr=jobs[-1].lr * 2))
    return jobs


def ranked(results: Results, jobs: list[Job]) -> list[Job]:
    """Return the jobs by their loss on the validation part, the lowest first."""
    return sorted(jobs, key=lambda job: nll(results[job]))


def finalists(results: Results, task: str, name: str, epochs: int = 2) -> list[list[Job]]:
    """Return the jobs of all seeds at the best learning rate; none while it is not known.

    On E2E, at the two best ones: its validation part is too small to choose by one seed.
    """
    searched = search(results, task, name, epochs)
    if not all(job in results for job in searched):
        return []
    best = ranked(results, searched)[: 2 if task == "e2e" else 1]
    return [[replace(job, seed=seed) for seed in results.seeds] for job in best]


def seeds(results: Results, task: str, name: str, epochs: int = 2) -> list[Job]:
    """Return the finished jobs at the chosen learning rate, one for each seed."""
    return min(finalists(results, task, name, epochs), key=lambda jobs: loss(results, jobs))


def loss(results: Results, jobs: list[Job]) -> float:
    """Return the mean loss on the validation part."""
    return mean(nll(results[job]) for job in jobs)


def compared(results: Results, task: str, names: Iterable[str], epochs: int = 2) -> list[Job]:
    """Return the jobs of some methods: those that search, then those of all seeds."""
    jobs = []
    for name in names:
        jobs += search(results, task, name, epochs)
        jobs += chain.from_iterable(finalists(results, task, name, epochs))
    return jobs


def by_epochs(results: Results, task: str, name: str, most: int = 2) -> list[Job]:
    """Return the jobs that choose the number of epochs: one or two, and at most four if two are better.

    Each has a search. Three seeds decide between those whose loss is near the lowest.
    """
    jobs: list[Job] = []
    for tried in ((1, 2), (1, 2, 4))[: most // 2]:
        jobs = [job for epochs in tried for job in search(results, task, name, epochs)]
        if not all(job in results for job in jobs):
            return jobs
        near = near_best(results, task, name, tried)
        jobs += [job for epochs in near for of_seeds in finalists(results, task, name, epochs) for job in of_seeds]
        if not all(job in results for job in jobs) or lowest(results, task, name, near)[0].epochs != 2:
            return jobs
    return jobs


def near_best(results: Results, task: str, name: str, tried: Iterable[int]) -> list[int]:
    """Return the numbers of epochs whose loss of one seed is near the lowest."""
    losses = {epochs: nll(results[ranked(results, search(results, task, name, epochs))[0]]) for epochs in tried}
    return [epochs for epochs, found in losses.items() if found < min(losses.values()) + NEAR]


def lowest(results: Results, task: str, name: str, tried: Iterable[int]) -> list[Job]:
    """Return the jobs of three seeds whose mean loss is the lowest."""
    return min((seeds(results, task, name, epochs) for epochs in tried), key=lambda jobs: loss(results, jobs))


def by_all_epochs(results: Results, most: int) -> list[Job]:
    """Return these jobs for all methods that choose their number of epochs, on both tasks."""
    jobs = []
    for task in ("reviews", "definitions"):
        for name in EPOCHS:
            jobs += by_epochs(results, task, name, most)
    return jobs


def tried_epochs(results: Results, task: str, name: str) -> list[int]:
    """Return the numbers of epochs whose jobs are finished."""
    longer = by_epochs(results, task, name, 4)
    jobs = longer if all(job in results for job in longer) else by_epochs(results, task, name)
    return sorted({job.epochs for job in jobs})


def at_best_epochs(results: Results, task: str, name: str) -> list[Job]:
    """Return the finished jobs at the best number of epochs and its best rate, one for each seed."""
    tried = tried_epochs(results, task, name)
    return lowest(results, task, name, near_best(results, task, name, tried))


NEAR = 0.03  # two and a half times the deviation between seeds of full fine-tuning


def at_one_rate(results: Results, name: str) -> list[Job]:
    """Return the jobs of a method of tables 5 and 6, one for each seed."""
    return [Job("reviews", name, RATE, seed) for seed in results.seeds]


def unsearched(results: Results, names: Iterable[str]) -> list[Job]:
    """Return the jobs of table 5 or 6, and of a full fine-tuning that is as short."""
    jobs = compared(results, "reviews", ["full", "LoRA q v, r=8"], 1)  # the latter chose RATE
    return jobs + [job for name in names for job in at_one_rate(results, name)]


PROMPT_JOBS = [Job("prompts", name, 0.0) for name in PROMPTS]  # by their loss of one seed, a prompt is chosen


def best_prompt(results: Results) -> list[Job]:
    """Return the jobs of E2E whose prompt has the lowest loss, one for each seed."""
    best = ranked(results, PROMPT_JOBS)[0].method
    return [Job("e2e", best, 0.0, seed, epochs=2) for seed in results.seeds]


def of_e2e(results: Results) -> list[Job]:
    """Return the jobs of E2E: the prompts, the best one, and what is trained."""
    jobs = PROMPT_JOBS + compared(results, "e2e", E2E)
    return [*jobs, *best_prompt(results)] if all(job in results for job in PROMPT_JOBS) else jobs


def of_few(results: Results) -> list[Job]:
    """Return the jobs that have few texts to train on."""
    return [job for task, epochs in FEW_EPOCHS.items() for job in compared(results, task, FEW, epochs)]


def in_grid(results: Results, name: str) -> list[Job]:
    """Return the jobs of one row of the grid."""
    rates = GRID_RATES[1:3] if results.fast else GRID_RATES
    return [Job("reviews", name, lr) for lr in rates]


# What --only takes, and the jobs of each part. Table 3 needs the E2E data.
PARTS: dict[str, Callable[[Results], list[Job]]] = {
    "grid": lambda results: [job for name in GRID for job in in_grid(results, name)],
    "table2": lambda results: compared(results, "reviews", MAIN),
    "table3": of_e2e,
    "table5": lambda results: unsearched(results, WHICH),
    "table6": lambda results: unsearched(results, RANKS),
    "beyond": lambda results: compared(results, "reviews", ["full", "LoRA all, r=8", *BEYOND]),
    "definitions": lambda results: compared(results, "definitions", DEFINITIONS),
    "epochs": lambda results: by_all_epochs(results, 2),
    "longer": lambda results: by_all_epochs(results, 4),
    "prefix": lambda results: compared(results, "reviews", ["full", *PREFIX]),
    "few": of_few,
    "variants": lambda results: compared(results, "reviews", ["LoRA all, r=8", *VARIANTS], 1),
    "whole": lambda results: compared(results, "reviews", ["full", *EVERYTHING, *WHOLE], 1),
}

"""Which jobs each part of the study needs, given those that are finished."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import chain
from statistics import mean

from .jobs import Job, Result, Results, mistakes, nll
from .methods import (
    BEYOND,
    DEFINITIONS,
    DIGITS_EPOCHS,
    E2E,
    EMBEDDING,
    EPOCHS,
    EVERYTHING,
    FEW,
    FEW_EPOCHS,
    FROZEN_NORMS,
    GRID,
    GRID_RATES,
    LARGER,
    LITE2_EPOCHS,
    MAIN,
    METHODS,
    MOMENTA,
    MOMENTUM_OF_PACKAGE,
    ONE_SEED,
    PREFIX,
    PROMPTS,
    RANKS,
    RATE,
    TRAINED_NORMS,
    VARIANTS,
    WHICH,
    WHOLE,
    with_momentum,
)

Choice = Callable[[Result], float]
"""What a learning rate is chosen by: a number of the validation part, the lower the better."""
MOST_MORE_WITH_FEW = 4


def search(results: Results, task: str, name: str, epochs: int = 2) -> list[Job]:
    """Return the jobs of one seed that choose a method's learning rate: three, and one more where the edge wins.

    With four epochs, the search begins with the best rate of two, and half of it. With
    images, it may go on further.
    """
    rates = METHODS[name].rates
    if epochs == 4:
        best = seeds(results, task, name, 2)[0].lr
        rates = (best / 2, best)
    jobs = [Job(task, name, lr, epochs=epochs) for lr in rates]
    if results.fast or len(jobs) == 1:
        return jobs[:1]
    most_more = 3 if task.startswith("digits") else 1
    for _ in range(most_more):
        if are_finished(jobs, results):
            jobs = beyond_the_edge(results, jobs)
    return jobs


def beyond_the_edge(results: Results, jobs: list[Job], by: Choice = nll) -> list[Job]:
    """Add a rate below the lowest or above the highest one, if that is the best."""
    first, *_, last = jobs
    best = ranked(results, jobs, by)[0]
    if best == first:
        return [replace(first, lr=first.lr / 2), *jobs]
    if best == last:
        return [*jobs, replace(last, lr=last.lr * 2)]
    return jobs


def are_finished(jobs: Iterable[Job], results: Results) -> bool:
    """Whether all of these jobs have results."""
    return all(job in results for job in jobs)


def ranked(results: Results, jobs: list[Job], by: Choice = nll) -> list[Job]:
    """Return the jobs by their loss or their mistakes on the validation part, the lowest first."""
    return sorted(jobs, key=lambda job: by(results[job]))


def finalists(
    results: Results, task: str, name: str, epochs: int = 2
) -> list[list[Job]]:
    """Return the jobs of all seeds at the best learning rate; none while it is not known.

    On E2E, at the two best ones: its validation part is too small to choose by one
    seed.
    """
    searched = search(results, task, name, epochs)
    if not are_finished(searched, results):
        return []
    number = 2 if task == "e2e" else 1
    best = ranked(results, searched)[:number]
    return [of_all_seeds(results, job) for job in best]


def of_all_seeds(results: Results, job: Job) -> list[Job]:
    """Return the same job with each seed."""
    return [replace(job, seed=seed) for seed in results.seeds]


def seeds(results: Results, task: str, name: str, epochs: int = 2) -> list[Job]:
    """Return the finished jobs at the chosen learning rate, one for each seed."""
    return with_lowest_loss(results, finalists(results, task, name, epochs))


def with_lowest_loss(results: Results, several: Iterable[list[Job]]) -> list[Job]:
    """Return those jobs whose mean loss is the lowest."""
    return min(several, key=lambda jobs: loss(results, jobs))


def loss(results: Results, jobs: list[Job]) -> float:
    """Return the mean loss on the validation part."""
    return mean(nll(results[job]) for job in jobs)


def compared(
    results: Results, task: str, names: Iterable[str], epochs: int = 2
) -> list[Job]:
    """Return the jobs of some methods: those that search, then those of all seeds."""
    jobs = []
    for name in names:
        jobs += search(results, task, name, epochs)
        jobs += chain.from_iterable(finalists(results, task, name, epochs))
    return jobs


def searches(
    results: Results, task: str, names: Iterable[str], epochs: int
) -> list[Job]:
    """Return the jobs of one seed alone that search the rates of some methods."""
    jobs = []
    for name in names:
        jobs += search(results, task, name, epochs)
    return jobs


def by_epochs(results: Results, task: str, name: str, most: int = 2) -> list[Job]:
    """Return the jobs that choose the number of epochs: one or two, and at most four if two are better.

    Each has a search. Three seeds decide between those whose loss is near the lowest.
    """
    jobs = among_epochs(results, task, name, (1, 2))
    if (
        most == 4
        and are_finished(jobs, results)
        and best_among(results, task, name, (1, 2))[0].epochs == 2
    ):
        return among_epochs(results, task, name, (1, 2, 4))
    return jobs


def among_epochs(
    results: Results, task: str, name: str, tried: Iterable[int]
) -> list[Job]:
    """Return the jobs that choose between these numbers of epochs: those that search, then those of all seeds."""
    jobs = []
    for epochs in tried:
        jobs += search(results, task, name, epochs)
    if not are_finished(jobs, results):
        return jobs
    for epochs in near_best(results, task, name, tried):
        for of_seeds in finalists(results, task, name, epochs):
            jobs += of_seeds
    return jobs


def near_best(
    results: Results, task: str, name: str, tried: Iterable[int]
) -> list[int]:
    """Return the numbers of epochs whose loss of one seed is near the lowest."""
    losses = {}
    for epochs in tried:
        searched = search(results, task, name, epochs)
        best = ranked(results, searched)[0]
        losses[epochs] = nll(results[best])
    limit = min(losses.values()) + NEAR
    return [epochs for epochs, found in losses.items() if found < limit]


def best_among(
    results: Results, task: str, name: str, tried: Iterable[int]
) -> list[Job]:
    """Return the jobs of three seeds whose mean loss is the lowest, with one of these numbers of epochs."""
    near = near_best(results, task, name, tried)
    return with_lowest_loss(
        results, [seeds(results, task, name, epochs) for epochs in near]
    )


def by_all_epochs(results: Results, most: int) -> list[Job]:
    """Return these jobs for all methods that choose their number of epochs, on both tasks."""
    jobs = []
    for task in ("reviews", "definitions"):
        for name in EPOCHS:
            jobs += by_epochs(results, task, name, most)
    return jobs


def tried_epochs(results: Results, task: str, name: str) -> list[int]:
    """Return the numbers of epochs whose jobs are finished."""
    jobs = by_epochs(results, task, name, 4)
    if not are_finished(jobs, results):
        jobs = by_epochs(results, task, name)
    return sorted({job.epochs for job in jobs})


def at_best_epochs(results: Results, task: str, name: str) -> list[Job]:
    """Return the finished jobs at the best number of epochs and its best rate, one for each seed."""
    return best_among(results, task, name, tried_epochs(results, task, name))


NEAR = 0.03  # two and a half times the deviation between seeds of full fine-tuning


def at_one_rate(results: Results, name: str) -> list[Job]:
    """Return the jobs of a method of tables 5 and 6, one for each seed."""
    return of_all_seeds(results, Job("reviews", name, RATE))


def unsearched(results: Results, names: Iterable[str]) -> list[Job]:
    """Return the jobs of table 5 or 6, and of a full fine-tuning that is as short."""
    # the latter chose RATE
    jobs = compared(results, "reviews", ["full", "LoRA q v, r=8"], 1)
    for name in names:
        jobs += at_one_rate(results, name)
    return jobs


# by their loss of one seed, a prompt is chosen
PROMPT_JOBS = [Job("prompts", name, 0.0) for name in PROMPTS]


def best_prompt(results: Results) -> list[Job]:
    """Return the jobs of E2E whose prompt has the lowest loss, one for each seed."""
    best = ranked(results, PROMPT_JOBS)[0].method
    return of_all_seeds(results, Job("e2e", best, 0.0, epochs=2))


def of_e2e(results: Results) -> list[Job]:
    """Return the jobs of E2E: the prompts, the best one, and what is trained."""
    jobs = PROMPT_JOBS + compared(results, "e2e", E2E)
    if are_finished(PROMPT_JOBS, results):
        jobs += best_prompt(results)
    return jobs


def of_few(results: Results) -> list[Job]:
    """Return the jobs that have few texts to train on."""
    jobs = []
    for task in FEW_EPOCHS:
        for name in FEW:
            searched = search_with_few(results, task, name)
            jobs += searched
            if are_finished(searched, results):
                jobs += at_best_with_few(results, task, name, nll)
                jobs += at_best_with_few(results, task, name, mistakes)
    return jobs


def search_with_few(results: Results, task: str, name: str) -> list[Job]:
    """Return the jobs of one seed that choose a rate twice: by the loss, and by the mistakes.

    With few texts, the two prefer other rates. So the search goes on where the edge
    wins by one of them.
    """
    jobs = [Job(task, name, lr, epochs=FEW_EPOCHS[task]) for lr in METHODS[name].rates]
    if results.fast:
        return jobs[:1]
    for _ in range(MOST_MORE_WITH_FEW):
        for by in (nll, mistakes):
            if are_finished(jobs, results):
                jobs = beyond_the_edge(results, jobs, by)
    return jobs


def at_best_with_few(results: Results, task: str, name: str, by: Choice) -> list[Job]:
    """Return the jobs at the rate that this choice prefers, one for each seed."""
    searched = search_with_few(results, task, name)
    best = ranked(results, searched, by)[0]
    return of_all_seeds(results, best)


def of_digits(results: Results) -> list[Job]:
    """Return the jobs that read digits: norms stay frozen, or they train with one momentum or another."""
    jobs = []
    for task, epochs in DIGITS_EPOCHS.items():
        jobs += compared(results, task, FROZEN_NORMS, epochs)
        for name in TRAINED_NORMS:
            jobs += by_momentum(results, task, name)
    return jobs


def of_larger_network(results: Results) -> list[Job]:
    """Return the jobs of the larger network that reads digits: norms stay frozen."""
    jobs = []
    for task, epochs in LITE2_EPOCHS.items():
        jobs += compared(results, task, FROZEN_NORMS, epochs)
    return jobs


def by_momentum(results: Results, task: str, name: str) -> list[Job]:
    """Return the jobs that choose a momentum: the search of the rate, one seed of each momentum, and all of the best.

    The momentum of the package has all seeds too.
    """
    searched = at_first_momentum(results, task, name)
    if not are_finished(searched, results):
        return searched
    tried = at_each_momentum(results, task, name)
    jobs = [*searched, *tried, *with_momentum_of_package(results, task, name)]
    if are_finished(tried, results):
        jobs += of_all_seeds(results, ranked(results, tried)[0])
    return jobs


def at_first_momentum(results: Results, task: str, name: str) -> list[Job]:
    """Return the jobs that search the learning rate."""
    first = with_momentum(name, MOMENTA[0])
    return search(results, task, first, DIGITS_EPOCHS[task])


def at_each_momentum(results: Results, task: str, name: str) -> list[Job]:
    """Return the jobs of one seed at the best rate, one for each momentum."""
    searched = at_first_momentum(results, task, name)
    best = ranked(results, searched)[0]
    return [replace(best, method=with_momentum(name, momentum)) for momentum in MOMENTA]


def at_best_momentum(results: Results, task: str, name: str) -> list[Job]:
    """Return the finished jobs at the best momentum, one for each seed."""
    best = ranked(results, at_each_momentum(results, task, name))[0]
    return of_all_seeds(results, best)


def with_momentum_of_package(results: Results, task: str, name: str) -> list[Job]:
    """Return the jobs at the momentum that the network's package has, one for each seed."""
    first = at_each_momentum(results, task, name)[0]
    return of_all_seeds(
        results, replace(first, method=with_momentum(name, MOMENTUM_OF_PACKAGE))
    )


def of_grid(results: Results) -> list[Job]:
    """Return the jobs of the grid."""
    jobs = []
    for name in GRID:
        jobs += in_grid(results, name)
    return jobs


def in_grid(results: Results, name: str) -> list[Job]:
    """Return the jobs of one row of the grid."""
    rates = GRID_RATES[1:3] if results.fast else GRID_RATES
    return [Job("reviews", name, lr) for lr in rates]


# What --only takes, and the jobs of each part. Table 3 needs the E2E data.
PARTS: dict[str, Callable[[Results], list[Job]]] = {
    "grid": of_grid,
    "table2": partial(compared, task="reviews", names=MAIN),
    "table3": of_e2e,
    "table5": partial(unsearched, names=WHICH),
    "table6": partial(unsearched, names=RANKS),
    "beyond": partial(
        compared, task="reviews", names=["full", "LoRA all, r=8", *BEYOND]
    ),
    "definitions": partial(compared, task="definitions", names=DEFINITIONS),
    "epochs": partial(by_all_epochs, most=2),
    "longer": partial(by_all_epochs, most=4),
    "prefix": partial(compared, task="reviews", names=["full", *PREFIX]),
    "few": of_few,
    "digits": of_digits,
    "digits-lite2": of_larger_network,
    "variants": partial(
        compared, task="reviews", names=["LoRA all, r=8", *VARIANTS], epochs=1
    ),
    "embedding": partial(
        compared, task="reviews", names=["full", *EMBEDDING, *LARGER], epochs=1
    ),
    "once": partial(searches, task="reviews", names=ONE_SEED, epochs=1),
    "whole": partial(
        compared, task="reviews", names=["full", *EVERYTHING, *WHOLE], epochs=1
    ),
}

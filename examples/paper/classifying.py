"""Tables of film reviews and of definitions: how well methods classify them."""

from collections.abc import Callable, Iterable

import numpy as np

from .cells import (
    ACCURACY,
    WHOLE,
    accuracy,
    difference,
    differences,
    listed,
    markdown,
    mean_of,
    rate,
    rates_of,
    trained,
)
from .jobs import Job, Results, mistakes, nll
from .methods import (
    EPOCHS,
    EVERYTHING,
    FEW,
    FEW_EPOCHS,
    GRID_RANKS,
    SCALINGS,
    grid_name,
)
from .plan import (
    Choice,
    at_best_epochs,
    at_best_with_few,
    at_one_rate,
    in_grid,
    loss,
    near_best,
    ranked,
    search_with_few,
    seeds,
    tried_epochs,
)

CLASSIFYING = ("reviews", "definitions")


# One method in a row: how good it is, and how it differs from full fine-tuning


def classified(results: Results, best: list[Job], jobs_of: dict[str, list[Job]]) -> str:
    """Accuracy and loss on the test part, each seed shown, and differences to full fine-tuning."""
    rows = []
    for name, jobs in jobs_of.items():
        of_seeds = [accuracy(results, [job]) for job in jobs]
        own_task = 100 * mean_of(results, jobs, "own_task")
        found = [
            rate(jobs),
            accuracy(results, jobs),
            " ".join(of_seeds),
            *differences(results, jobs, best),
        ]
        rows.append([name, *found, trained(results, jobs), f"{own_task:.1f}"])
    header = [
        "method",
        "rate",
        "accuracy",
        "seeds",
        "minus full",
        "loss minus full",
        "trained",
        "own task",
    ]
    return markdown(header, rows)


def searched(results: Results, task: str, names: Iterable[str], epochs: int = 2) -> str:
    """Compare methods, each at its best learning rate."""
    jobs_of = {name: seeds(results, task, name, epochs) for name in names}
    return classified(results, seeds(results, task, "full", epochs), jobs_of)


def unsearched(results: Results, names: Iterable[str]) -> str:
    """Compare methods at one learning rate, after one epoch."""
    best = seeds(results, "reviews", "full", 1)
    jobs_of = {"full": best}
    for name in names:
        jobs_of[name] = at_one_rate(results, name)
    return classified(results, best, jobs_of)


def own_epochs(results: Results, task: str) -> str:
    """Compare methods at their own number of epochs, with seeds, rates and what is forgotten."""
    jobs_of = {}
    for name in EPOCHS:
        jobs = at_best_epochs(results, task, name)
        jobs_of[with_epochs(name, jobs)] = jobs
    return classified(results, at_best_epochs(results, task, "full"), jobs_of)


def with_epochs(name: str, jobs: list[Job]) -> str:
    """Return the name of a method with the number of epochs of its jobs."""
    epochs = jobs[0].epochs
    if epochs == 1:
        return f"{name}, 1 epoch"
    return f"{name}, {epochs} epochs"


def short(results: Results) -> str:
    """Compare methods with full fine-tuning, each at its own best number of epochs and rate, on both tasks."""
    rows = []
    for task in CLASSIFYING:
        best = at_best_epochs(results, task, "full")
        for name in EPOCHS:
            jobs = at_best_epochs(results, task, name)
            title = f"{task}: {with_epochs(name, jobs)}"
            rows.append(
                [title, accuracy(results, jobs), *differences(results, jobs, best)]
            )
    return markdown(["", "accuracy", "minus full", "loss minus full"], rows)


def fresh(results: Results) -> str:
    """Compare the same on definitions that no earlier version of the study has seen."""
    best = at_best_epochs(results, "definitions", "full")
    rows = []
    for name in EPOCHS:
        jobs = at_best_epochs(results, "definitions", name)
        found = differences(results, jobs, best, "fresh")
        rows.append([name, accuracy(results, jobs, "fresh"), *found])
    return markdown(["", "accuracy", "minus full", "loss minus full"], rows)


def forgotten(results: Results) -> str:
    """What is left of the own task after two epochs of another."""
    rows = []
    for task in CLASSIFYING:
        best = seeds(results, task, "full")
        for name in ("full", "LoRA all, r=8"):
            jobs = seeds(results, task, name)
            points = difference(results, jobs, best, ACCURACY, "own")
            rows.append([f"{task}: {name}", accuracy(results, jobs, "own"), points])
    return markdown(["", "own task", "minus full"], rows)


def few(results: Results, by: Choice) -> str:
    """Compare methods that have few texts to train on, each at the rate that this choice prefers."""
    rows = []
    for task in FEW_EPOCHS:
        best = at_best_with_few(results, task, "full", by)
        for name in FEW:
            jobs = at_best_with_few(results, task, name, by)
            title = f"{texts_of(task)} texts: {name}"
            behind = differences(results, jobs, best)
            rows.append([title, rate(jobs), accuracy(results, jobs), *behind])
    header = ["", "rate", "accuracy", "minus full", "loss minus full"]
    return markdown(header, rows)


def texts_of(task: str) -> str:
    """Return how many texts a task has to train on, as its name says."""
    return task.partition("-")[2]


# Two methods in a row


def pairs(
    results: Results,
    jobs_of: Callable[[Results, str], list[Job]],
    compared: list[tuple[str, str]],
) -> str:
    """Compare methods with each other."""
    rows = []
    for one, other in compared:
        found = differences(results, jobs_of(results, one), jobs_of(results, other))
        rows.append([f"{one}, minus {other}", *found])
    return markdown(["", "accuracy", "loss"], rows)


def on_reviews(results: Results, name: str) -> list[Job]:
    """Return the jobs of a method at its best learning rate."""
    return seeds(results, "reviews", name)


def after_one_epoch(results: Results, name: str) -> list[Job]:
    """Return the same after one epoch."""
    return seeds(results, "reviews", name, 1)


def on_definitions(results: Results, name: str) -> list[Job]:
    """Return the jobs of a method on definitions, at its best learning rate."""
    return seeds(results, "definitions", name)


def together(results: Results) -> str:
    """Compare with full fine-tuning on twice as many texts, after two epochs and each at its own best number."""
    full = seeds(results, "reviews", "full")
    rows = []
    for name in ("LoRA all, r=8", "LoRA all, r=16", *EVERYTHING):
        jobs = seeds(results, "reviews", name)
        rows.append(
            [f"reviews, two epochs: {name}", *on_both_parts(results, jobs, full)]
        )
    for name in EVERYTHING:
        jobs = at_best_epochs(results, "reviews", name)
        rows.append(
            [
                f"reviews, own epochs, full two: {name}",
                *on_both_parts(results, jobs, full),
            ]
        )
    for task in CLASSIFYING:
        full = at_best_epochs(results, task, "full")
        for name in EPOCHS:
            if name != "full":
                jobs = at_best_epochs(results, task, name)
                rows.append(
                    [f"{task}, own epochs: {name}", *on_both_parts(results, jobs, full)]
                )
    return markdown(["", "accuracy minus full", "loss minus full"], rows)


def on_both_parts(results: Results, jobs: list[Job], others: list[Job]) -> list[str]:
    """Return the differences on the texts of validation and test together."""
    return differences(results, jobs, others, "validation", "test")


# Losses on the validation part, by which rates and epochs were chosen


def grid(results: Results) -> str:
    """Loss on the validation part, by scaling, rank and rate."""
    rows = []
    for scaling in SCALINGS:
        for r in GRID_RANKS:
            jobs = in_grid(results, grid_name(r, scaling))
            losses = [nll(results[job]) for job in jobs]
            cells = [f"{each:.3f}" for each in losses]
            best = int(np.argmin(losses))
            cells[best] = f"**{cells[best]}**"
            rows.append([scaling, r, *cells])
    rates = [rate([job]) for job in jobs]
    return markdown(["scaling", "r", *rates], rows)


def rates(results: Results, task: str, names: Iterable[str], epochs: int = 2) -> str:
    """Loss on the validation part at each learning rate that was tried."""
    rows = [[name, rates_of(results, task, name, epochs)] for name in names]
    return markdown(["", "rate: loss"], rows)


def few_rates(results: Results) -> str:
    """Loss and accuracy on the validation part at each learning rate that was tried with few texts."""
    rows = []
    for task, epochs in FEW_EPOCHS.items():
        for name in FEW:
            title = f"{texts_of(task)} texts: {name}"
            losses = losses_with_few(results, task, name)
            accuracies = accuracies_with_few(results, task, name)
            rows.append([title, epochs, losses, accuracies])
    return markdown(["", "epochs", "rate: loss", "rate: accuracy"], rows)


def losses_with_few(results: Results, task: str, name: str) -> str:
    """Return each rate with its loss; the lowest is bold."""
    searched = search_with_few(results, task, name)
    tried = {job: f"{job.lr:g}:{WHOLE}{nll(results[job]):.3f}" for job in searched}
    best = ranked(results, searched, nll)[0]
    return listed(tried, best)


def accuracies_with_few(results: Results, task: str, name: str) -> str:
    """Return each rate with its accuracy; the highest is bold."""
    searched = search_with_few(results, task, name)
    tried = {
        job: f"{job.lr:g}:{WHOLE}{accuracy(results, [job], 'validation')}"
        for job in searched
    }
    best = ranked(results, searched, mistakes)[0]
    return listed(tried, best)


def one_epoch(results: Results, names: Iterable[str]) -> str:
    """Loss at each learning rate on reviews, and the mean over the seeds at the best one."""
    rows = []
    for name in names:
        mean = loss(results, seeds(results, "reviews", name, 1))
        rows.append([name, rates_of(results, "reviews", name, 1), f"{mean:.4f}"])
    return markdown(["", "rate: loss of one seed", "mean of three"], rows)


def epoch_losses(results: Results) -> str:
    """Loss on the validation part by number of epochs: of one seed at each rate, and the mean of three at the best."""
    rows = []
    for task in CLASSIFYING:
        for name in EPOCHS:
            for epochs in tried_epochs(results, task, name):
                losses = rates_of(results, task, name, epochs)
                mean = mean_of_three(results, task, name, epochs)
                rows.append([f"{task}: {name}", epochs, losses, mean])
    return markdown(["", "epochs", "rate: loss of one seed", "mean of three"], rows)


def mean_of_three(results: Results, task: str, name: str, epochs: int) -> str:
    """Return the mean loss, bold if it is the best; a dash if one seed was too far behind to try more."""
    tried = tried_epochs(results, task, name)
    if epochs not in near_best(results, task, name, tried):
        return "–"
    jobs = seeds(results, task, name, epochs)
    mean = f"{loss(results, jobs):.4f}"
    is_best = jobs == at_best_epochs(results, task, name)
    return f"**{mean}**" if is_best else mean

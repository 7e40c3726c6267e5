"""Tables of images of digits: how well methods read them, with norms that are frozen and with norms that train."""

from .cells import accuracy, differences, markdown, rate, rates_of, trained
from .jobs import Job, Results
from .methods import (
    DIGITS_EPOCHS,
    FROZEN_NORMS,
    LITE2_EPOCHS,
    MOMENTA,
    TRAINED_NORMS,
    with_momentum,
)
from .plan import (
    at_best_momentum,
    at_each_momentum,
    loss,
    seeds,
    with_momentum_of_package,
)

COLUMNS = ["", "rate", "accuracy", "seeds", "minus full", "loss minus full", "trained"]


def digits(results: Results) -> str:
    """Compare with the better one of two ways to fine-tune in full."""
    rows = []
    for task in DIGITS_EPOCHS:
        jobs_of = shown(results, task)
        best = best_full(results, jobs_of)
        for name, jobs in jobs_of.items():
            rows.append(compared_row(results, title(task, name), jobs, best))
    return markdown(COLUMNS, rows)


def compared_row(
    results: Results, title: str, jobs: list[Job], full: list[Job]
) -> list[str]:
    """Return a row of the tables: how well these jobs read, and their difference to full fine-tuning."""
    return [
        title,
        rate(jobs),
        accuracy(results, jobs),
        of_each_seed(results, jobs),
        *differences(results, jobs, full),
        trained(results, jobs),
    ]


def digits_of_larger_network(results: Results) -> str:
    """Compare the rows of the larger network with its full fine-tuning."""
    rows = []
    for task, epochs in LITE2_EPOCHS.items():
        jobs_of = {name: seeds(results, task, name, epochs) for name in FROZEN_NORMS}
        best = best_full(results, jobs_of)
        for name, jobs in jobs_of.items():
            rows.append(compared_row(results, title(task, name), jobs, best))
    return markdown(COLUMNS, rows)


def shown(results: Results, task: str) -> dict[str, list[Job]]:
    """Return the jobs of each row: norms that train have a row for the best momentum, and for that of the package."""
    jobs_of = {}
    for name in FROZEN_NORMS:
        jobs_of[name] = seeds(results, task, name, DIGITS_EPOCHS[task])
    for name in TRAINED_NORMS:
        for jobs in (
            at_best_momentum(results, task, name),
            with_momentum_of_package(results, task, name),
        ):
            jobs_of[jobs[0].method] = jobs
    return jobs_of


def best_full(results: Results, jobs_of: dict[str, list[Job]]) -> list[Job]:
    """Return the jobs that train all weights and have the lowest loss on the validation part."""
    losses = {}
    for name, jobs in jobs_of.items():
        if name.startswith("full"):
            losses[name] = loss(results, jobs)
    return jobs_of[min(losses, key=losses.__getitem__)]


def title(task: str, name: str) -> str:
    """Return what a row is of: the name of a task says how many images it has to train on."""
    _, _, images = task.rpartition("-")
    return f"{images} images: {name}"


def of_each_seed(results: Results, jobs: list[Job]) -> str:
    """Return the accuracy of each seed."""
    return " ".join(accuracy(results, [job]) for job in jobs)


def rates_of_larger_network(results: Results) -> str:
    """Loss on the validation part at each learning rate, for the larger network."""
    rows = []
    for task, epochs in LITE2_EPOCHS.items():
        for name in FROZEN_NORMS:
            losses = rates_of(results, task, name, epochs)
            rows.append([title(task, name), epochs, losses])
    return markdown(["", "epochs", "rate: loss"], rows)


def digits_rates(results: Results) -> str:
    """Loss on the validation part at each learning rate, and at each momentum of the best rate."""
    rows = []
    for task, epochs in DIGITS_EPOCHS.items():
        for name in searched_methods():
            losses = rates_of(results, task, name, epochs)
            rows.append([title(task, name), epochs, losses])
        for name in TRAINED_NORMS:
            _, *others = at_each_momentum(results, task, name)
            for job in others:
                found = loss(results, [job])
                rows.append(
                    [title(task, job.method), epochs, f"{job.lr:g}: {found:.3f}"]
                )
    return markdown(["", "epochs", "rate: loss"], rows)


def searched_methods() -> list[str]:
    """Return the methods whose rate is searched: those with norms that train, at the first momentum."""
    trained_norms = [with_momentum(name, MOMENTA[0]) for name in TRAINED_NORMS]
    return [*FROZEN_NORMS, *trained_norms]

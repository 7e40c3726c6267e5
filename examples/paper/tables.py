"""The tables of the pages, made from the JSON files alone."""

from collections.abc import Callable, Iterable

import numpy as np

from . import methods, stats
from .cells import accuracy, difference, differences, items, markdown, rates_of
from .jobs import Job, Results, nll
from .methods import (
    BEYOND,
    DEFINITIONS,
    E2E,
    EPOCHS,
    EVERYTHING,
    FEW,
    FEW_EPOCHS,
    GRID_RANKS,
    MAIN,
    PREFIX,
    RANKS,
    SCALINGS,
    WHICH,
    grid_name,
)
from .plan import (
    PROMPT_JOBS,
    at_best_epochs,
    at_one_rate,
    best_prompt,
    in_grid,
    loss,
    near_best,
    seeds,
    tried_epochs,
)


def grid(results: Results) -> str:
    """Loss on the validation part, by scaling, rank and rate."""
    rows = []
    for scaling in SCALINGS:
        for r in GRID_RANKS:
            jobs = in_grid(results, grid_name(r, scaling))
            losses = [nll(results[job]) for job in jobs]
            best = int(np.argmin(losses))
            cells = [f"{each:.3f}" for each in losses]
            cells[best] = f"**{cells[best]}**"
            rows.append([scaling, r, *cells])
    return markdown(["scaling", "r", *(f"{job.lr:g}" for job in jobs)], rows)


def classified(results: Results, best: list[Job], jobs_of: dict[str, list[Job]]) -> str:
    """Accuracy and loss on the test part, each seed shown, and differences to full fine-tuning."""
    rows = []
    for name, jobs in jobs_of.items():
        of_seeds = " ".join(f"{accuracy(results, [job]):.1f}" for job in jobs)
        row = [name, f"{jobs[0].lr:g}", f"{accuracy(results, jobs):.1f}", of_seeds]
        row += differences(results, jobs, best)
        own = np.mean([results[job]["own_task"] for job in jobs])
        rows.append([*row, f"{results[jobs[0]]['trained']:,}", f"{100 * own:.1f}"])
    header = ["method", "rate", "accuracy", "seeds", "minus full", "loss minus full", "trained", "own task"]
    return markdown(header, rows)


def written(results: Results) -> str:
    """BLEU and the other measures on E2E, each seed shown, and differences to full fine-tuning."""
    best, rows = seeds(results, "e2e", "full"), []
    for jobs in (best_prompt(results), *(seeds(results, "e2e", name) for name in E2E)):
        name = jobs[0].method
        scores = [stats.bleu(items(results[job], "bleu").mean(0)) for job in jobs]
        wrong = np.mean([stats.share(items(results[job], "wrong_slots", "slots").mean(0)) for job in jobs])
        rouge = 100 * np.mean([items(results[job], "rouge_l").mean() for job in jobs])
        nist = np.mean([results[job]["nist"] for job in jobs])
        rows.append(
            [
                name,
                f"{jobs[0].lr:g}" if jobs[0].lr else "–",
                f"{np.mean(scores):.1f}",
                " ".join(f"{value:.1f}" for value in scores),
                difference(results, jobs, best, ["bleu"], stats.bleu, 1, 1),
                f"{nist:.2f}",
                f"{rouge:.1f}",
                f"{wrong:.1f}",
                difference(results, jobs, best, ["wrong_slots", "slots"], stats.share, 1, 1),
                f"{results[jobs[0]]['trained']:,}",
                f"{np.mean([results[job]['own_task'] for job in jobs]):.2f}",
            ]
        )
    people = results.found["references"]
    wrong = 100 * people["wrong_slots"] / people["slots"]
    rows.append(["people", *"–" * 6, f"{wrong:.1f}", *"–" * 3])
    measured = ["BLEU", "seeds", "minus full", "NIST", "ROUGE-L", "slots wrong, %", "minus full", "trained", "own task"]
    header = ["method", "rate", *measured]
    return markdown(header, rows)


def prompted(results: Results) -> str:
    """Loss of each prompt on E2E's validation part."""
    best = best_prompt(results)[0].method
    rows = [[job.method, f"{nll(results[job]):.3f}"] for job in PROMPT_JOBS]
    return markdown(["", "loss"], [[name, f"**{each}**" if name == best else each] for name, each in rows])


def costs(results: Results, task: str) -> str:
    """What each method costs."""
    found, rows = results.found[f"costs-{task}"], []
    trained = {each["method"]: f"{each['trained']:,}" for each in results.found.values() if each.get("task") == task}
    for name, cost in found.items():
        seconds, of_full = cost["step_seconds"], found["full"]["step_seconds"]
        rows.append([name, trained.get(name, "–"), *sizes(cost), f"{seconds:.2f} s", f"{seconds / of_full:.2f}"])
    return markdown(["method", "trained", *SIZES.values(), "a step", "over full"], rows)


def amplification(results: Results) -> str:
    """Norms of the query weights, for table 7: the mean over layers."""
    rows = []
    for found in results.found["subspaces"]["amplification"]:
        update, along_update, whole = found["update"]
        along = [along_update, found["weight"][1], found["random"][1]]
        norms = [f"{norm:.1f}" for norm in (whole, update, *along)]
        rows.append([found["method"], *norms, f"{update / along_update:.1f}"])
    return markdown(["method", "W", "ΔW", "W along ΔW", "W along itself", "W along random", "ΔW over W along ΔW"], rows)


SIZES = {"optimizer_bytes": "optimizer state", "checkpoint_bytes": "checkpoint", "memory_bytes": "memory added"}


def sizes(cost: dict[str, float]) -> list[str]:
    """Return what a method needs, in megabytes."""
    return [f"{cost[key] / 1e6:,.1f} MB" for key in SIZES]


def overview(results: Results) -> str:
    """How good the main methods are, and what they cost, for the README."""
    best, cost = at_best_epochs(results, "reviews", "full"), results.found["costs-reviews"]
    rows = []
    for name, title in OVERVIEW.items():
        jobs = at_best_epochs(results, "reviews", name) if name in EPOCHS else seeds(results, "reviews", name)
        behind, _ = differences(results, jobs, best)
        _, checkpoint, memory = sizes(cost[name])
        trained = f"{results[jobs[0]]['trained']:,}"
        rows.append([title, jobs[0].epochs, f"{accuracy(results, jobs):.1f} %", behind, trained, checkpoint, memory])
    return markdown(["", "epochs", "test accuracy", "minus full", "trained", "checkpoint", "memory added"], rows)


OVERVIEW = {
    "full": "full fine-tuning",
    "LoRA everything, r=8": "LoRA, everything, r=8",
    "LoRA all, r=8": "LoRA, all linear layers, r=8",
    "probe": "new head only",
}


def short(results: Results) -> str:
    """Compare methods with full fine-tuning, each at its own best number of epochs and rate, on both tasks."""
    rows = []
    for task in CLASSIFYING:
        best = at_best_epochs(results, task, "full")
        for name in EPOCHS:
            jobs = at_best_epochs(results, task, name)
            found = [f"{accuracy(results, jobs):.1f}", *differences(results, jobs, best)]
            rows.append([f"{task}: {with_epochs(name, jobs)}", *found])
    return markdown(["", "accuracy", "minus full", "loss minus full"], rows)


def with_epochs(name: str, jobs: list[Job]) -> str:
    """Return the name of a method with the number of epochs of its jobs."""
    return f"{name}, {jobs[0].epochs} epoch{'s' * (jobs[0].epochs > 1)}"


CLASSIFYING = ("reviews", "definitions")


def fresh(results: Results) -> str:
    """Compare the same on definitions that no earlier version of the study has seen."""
    rows, best = [], at_best_epochs(results, "definitions", "full")
    for name in EPOCHS:
        jobs = at_best_epochs(results, "definitions", name)
        rows.append([name, f"{accuracy(results, jobs, 'fresh'):.1f}", *differences(results, jobs, best, "fresh")])
    return markdown(["", "accuracy", "minus full", "loss minus full"], rows)


def forgotten(results: Results) -> str:
    """What is left of the own task after two epochs of another."""
    rows = []
    for task in CLASSIFYING:
        best = seeds(results, task, "full")
        for name in ("full", "LoRA all, r=8"):
            jobs = seeds(results, task, name)
            points = difference(results, jobs, best, ["correct"], stats.average, 100, 1, "own")
            rows.append([f"{task}: {name}", f"{accuracy(results, jobs, 'own'):.1f}", points])
    return markdown(["", "own task", "minus full"], rows)


def few(results: Results) -> str:
    """Compare methods that have few texts to train on."""
    rows = []
    for task, epochs in FEW_EPOCHS.items():
        _, _, texts = task.partition("-")
        best = seeds(results, task, "full", epochs)
        for name in FEW:
            jobs = seeds(results, task, name, epochs)
            found = [f"{accuracy(results, jobs):.1f}", *differences(results, jobs, best)]
            rows.append([f"{texts} texts: {name}", *found])
    return markdown(["", "accuracy", "minus full", "loss minus full"], rows)


def few_rates(results: Results) -> str:
    """Loss on the validation part at each learning rate that was tried with few texts."""
    rows = []
    for task, epochs in FEW_EPOCHS.items():
        _, _, texts = task.partition("-")
        rows += [[f"{texts} texts: {name}", epochs, rates_of(results, task, name, epochs)] for name in FEW]
    return markdown(["", "epochs", "rate: loss"], rows)


def own_epochs(results: Results, task: str) -> str:
    """Compare the same with seeds, rates and what is forgotten."""
    each = {name: at_best_epochs(results, task, name) for name in EPOCHS}
    return classified(results, each["full"], {with_epochs(name, jobs): jobs for name, jobs in each.items()})


def epoch_losses(results: Results) -> str:
    """Loss on the validation part by number of epochs: of one seed at each rate, and the mean of three at the best."""
    rows = []
    for task in CLASSIFYING:
        for name in EPOCHS:
            tried, best = tried_epochs(results, task, name), at_best_epochs(results, task, name)
            near = near_best(results, task, name, tried)
            for epochs in tried:
                jobs = seeds(results, task, name, epochs) if epochs in near else []
                mean = f"{loss(results, jobs):.4f}" if jobs else "–"
                mean = f"**{mean}**" if jobs == best else mean
                rows.append([f"{task}: {name}", epochs, rates_of(results, task, name, epochs), mean])
    return markdown(["", "epochs", "rate: loss of one seed", "mean of three"], rows)


def gpt3() -> str:
    """Count what the paper counts for GPT-3: adapters on query and value of 96 layers, in fp16."""
    rows = []
    for r in (1, 4):
        trained = 96 * 2 * r * (12288 + 12288)
        rows.append([r, f"{trained:,}", f"{GPT3 / trained:,.0f}", f"{2 * trained / 1e6:.1f} MB"])
    return markdown(["r", "trained", "times fewer", "checkpoint"], rows)


GPT3 = 175_255_800_000  # parameters, by table 4 of the paper


def searched(results: Results, task: str, names: Iterable[str], epochs: int = 2) -> str:
    """Compare methods, each at its best learning rate."""
    best = seeds(results, task, "full", epochs)
    return classified(results, best, {name: seeds(results, task, name, epochs) for name in names})


def rates(results: Results, task: str, names: Iterable[str], epochs: int = 2) -> str:
    """Loss on the validation part at each learning rate that was tried."""
    return markdown(["", "rate: loss"], [[name, rates_of(results, task, name, epochs)] for name in names])


def one_epoch(results: Results, names: Iterable[str]) -> str:
    """Loss at each learning rate on reviews, and the mean over the seeds at the best one."""
    rows = []
    for name in names:
        of_seeds = seeds(results, "reviews", name, 1)
        rows.append([name, rates_of(results, "reviews", name, 1), f"{loss(results, of_seeds):.4f}"])
    return markdown(["", "rate: loss of one seed", "mean of three"], rows)


def unsearched(results: Results, names: Iterable[str]) -> str:
    """Compare methods at one learning rate, after one epoch."""
    best = seeds(results, "reviews", "full", 1)
    return classified(results, best, {"full": best, **{name: at_one_rate(results, name) for name in names}})


def pairs(results: Results, jobs_of: Callable[[Results, str], list[Job]], compared: list[tuple[str, str]]) -> str:
    """Compare methods with each other."""
    rows = []
    for one, other in compared:
        rows.append([f"{one}, minus {other}", *differences(results, jobs_of(results, one), jobs_of(results, other))])
    return markdown(["", "accuracy", "loss"], rows)


def best_rates(task: str) -> Callable[[Results, str], list[Job]]:
    """Return the jobs of a method at its best learning rate."""
    return lambda results, name: seeds(results, task, name)


def together(results: Results) -> str:
    """Compare with full fine-tuning on twice as many texts, after two epochs and each at its own best number."""
    full, rows = seeds(results, "reviews", "full"), []
    for name in ("LoRA all, r=8", "LoRA all, r=16", *EVERYTHING):
        jobs = seeds(results, "reviews", name)
        rows.append([f"reviews, two epochs: {name}", *differences(results, jobs, full, "validation", "test")])
    once = at_best_epochs(results, "reviews", *EVERYTHING)
    title = f"reviews, own epochs, full two: {once[0].method}"
    rows.append([title, *differences(results, once, full, "validation", "test")])
    for task in CLASSIFYING:
        full, *others = (at_best_epochs(results, task, name) for name in EPOCHS)
        for jobs in others:
            title = f"{task}, own epochs: {jobs[0].method}"
            rows.append([title, *differences(results, jobs, full, "validation", "test")])
    return markdown(["", "accuracy minus full", "loss minus full"], rows)


def verdicts(results: Results) -> str:
    """How many differences are resolved, one by one and all together."""
    for table in COMPARING:
        TABLES[table](results)
    found = [each for key, each in results.compared.items() if len(key) == 3]  # of the test part
    resolved, together = [each.is_resolved for each in found], stats.survivors([each.p for each in found])
    return markdown(
        ["differences", "clear one by one", "clear all together"], [[len(found), sum(resolved), sum(together)]]
    )


TARGETS = [("LoRA all, r=8", "LoRA q v, r=8")]
PAIRS = [*TARGETS, ("LoRA all, r=16", "LoRA all, r=8")]
WHICH_PAIRS = [(name, "LoRA q v, r=4") for name in WHICH if name != "LoRA q v, r=4"]
RANK_PAIRS = [(f"LoRA q v, r={r}", "LoRA q v, r=8") for r in (1, 2, 4, 64)]
BEYOND_PAIRS = [(name, "LoRA all, r=8") for name in BEYOND]
TABLES: dict[str, Callable[[Results], str]] = {
    "grid": grid,
    "table2": lambda results: searched(results, "reviews", MAIN),
    "table2-pairs": lambda results: pairs(results, best_rates("reviews"), PAIRS),
    "table2-rates": lambda results: rates(results, "reviews", MAIN),
    "table3": written,
    "table3-rates": lambda results: rates(results, "e2e", [name for name in E2E if name != "5-shot"]),
    "table3-prompts": prompted,
    "table5": lambda results: unsearched(results, WHICH),
    "table5-pairs": lambda results: pairs(results, at_one_rate, WHICH_PAIRS),
    "table6": lambda results: unsearched(results, RANKS),
    "table6-pairs": lambda results: pairs(results, at_one_rate, RANK_PAIRS),
    "table6-rates": lambda results: rates(results, "reviews", ["full", "LoRA q v, r=8"], epochs=1),
    "table7": amplification,
    "beyond": lambda results: searched(results, "reviews", ["LoRA all, r=8", *BEYOND]),
    "beyond-pairs": lambda results: pairs(results, best_rates("reviews"), BEYOND_PAIRS),
    "beyond-rates": lambda results: rates(results, "reviews", BEYOND),
    "definitions": lambda results: searched(results, "definitions", DEFINITIONS),
    "definitions-pairs": lambda results: pairs(results, best_rates("definitions"), TARGETS),
    "definitions-rates": lambda results: rates(results, "definitions", DEFINITIONS),
    "epochs": short,
    "epochs-reviews": lambda results: own_epochs(results, "reviews"),
    "epochs-definitions": lambda results: own_epochs(results, "definitions"),
    "epochs-losses": epoch_losses,
    "variants": lambda results: one_epoch(results, ["LoRA all, r=8", *methods.VARIANTS]),
    "whole": lambda results: one_epoch(results, ["full", *EVERYTHING, *methods.WHOLE]),
    "fresh": fresh,
    "forgotten": forgotten,
    "few": few,
    "few-rates": few_rates,
    "prefix": lambda results: searched(results, "reviews", PREFIX),
    "prefix-rates": lambda results: rates(results, "reviews", PREFIX),
    "gpt3": lambda _: gpt3(),
    "costs-reviews": lambda results: costs(results, "reviews"),
    "costs-e2e": lambda results: costs(results, "e2e"),
    "overview": overview,
    "together": together,
    "verdicts": verdicts,
}
COMPARING: tuple[str, ...] = (
    *("table2", "table2-pairs", "together", "table3", "table5", "table5-pairs", "table6", "table6-pairs"),
    *("beyond", "beyond-pairs", "definitions", "definitions-pairs"),
    *("epochs", "few", "prefix"),
)
"""Those with differences."""

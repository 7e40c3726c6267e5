"""The tables of the pages, made from the JSON files alone."""

from collections.abc import Callable
from functools import partial

from . import classifying, methods, reading, stats, writing
from .cells import accuracy, differences, markdown, trained
from .classifying import (
    after_one_epoch,
    on_definitions,
    on_reviews,
    pairs,
    rates,
    searched,
    unsearched,
)
from .coverage import coverages
from .jobs import Results, mistakes, nll
from .methods import (
    BEYOND,
    DEFINITIONS,
    E2E,
    EMBEDDING,
    EVERYTHING,
    LARGER,
    MAIN,
    ONE_SEED,
    PREFIX,
    RANKS,
    WHICH,
)
from .plan import at_one_rate, seeds

SIZES = {
    "optimizer_bytes": "optimizer state",
    "checkpoint_bytes": "checkpoint",
    "memory_bytes": "memory added",
}


def sizes(cost: dict[str, float]) -> list[str]:
    """Return what a method needs, in megabytes."""
    return [f"{cost[key] / 1e6:,.1f} MB" for key in SIZES]


def costs(results: Results, task: str) -> str:
    """What each method costs."""
    trained_by = {}
    for result in results.found.values():
        if result.get("task") == task:
            trained_by[result["method"]] = f"{result['trained']:,}"
    found = results.found[f"costs-{task}"]
    rows = []
    for name, cost in found.items():
        seconds = cost["step_seconds"]
        of_full = seconds / found["full"]["step_seconds"]
        rows.append(
            [
                name,
                trained_by.get(name, "–"),
                *sizes(cost),
                f"{seconds:.2f} s",
                f"{of_full:.2f}",
            ]
        )
    return markdown(["method", "trained", *SIZES.values(), "a step", "over full"], rows)


OVERVIEW = {
    "full": "full fine-tuning",
    "LoRA everything, r=8": "LoRA, everything, r=8",
    "LoRA all, r=8": "LoRA, all linear layers, r=8",
    "probe": "new head only",
}


def overview(results: Results) -> str:
    """How good the main methods are after two epochs, and what they cost, for the README."""
    full = seeds(results, "reviews", "full")
    rows = []
    for name, title in OVERVIEW.items():
        jobs = seeds(results, "reviews", name)
        behind, _ = differences(results, jobs, full)
        _, checkpoint, memory = sizes(results.found["costs-reviews"][name])
        found = [f"{accuracy(results, jobs)} %", behind, trained(results, jobs)]
        rows.append([title, *found, checkpoint, memory])
    return markdown(
        ["", "test accuracy", "minus full", "trained", "checkpoint", "memory added"],
        rows,
    )


def amplification(results: Results) -> str:
    """Norms of the query weights, for table 7: the mean over layers."""
    rows = []
    for found in results.found["subspaces"]["amplification"]:
        update, along_update, whole = found["update"]
        _, along_itself, _ = found["weight"]
        _, along_random, _ = found["random"]
        numbers = [
            whole,
            update,
            along_update,
            along_itself,
            along_random,
            update / along_update,
        ]
        rows.append([found["method"], *map("{:.1f}".format, numbers)])
    return markdown(
        [
            "method",
            "W",
            "ΔW",
            "W along ΔW",
            "W along itself",
            "W along random",
            "ΔW over W along ΔW",
        ],
        rows,
    )


GPT3 = 175_255_800_000  # parameters, by table 4 of the paper


def gpt3(_: Results) -> str:
    """Count what the paper counts for GPT-3: adapters on query and value of 96 layers, in fp16."""
    rows = []
    for r in (1, 4):
        trained = 96 * 2 * r * (12288 + 12288)
        megabytes = 2 * trained / 1e6
        rows.append(
            [r, f"{trained:,}", f"{GPT3 / trained:,.0f}", f"{megabytes:.1f} MB"]
        )
    return markdown(["r", "trained", "times fewer", "checkpoint"], rows)


def verdicts(results: Results) -> str:
    """How many differences are resolved, one by one and all together."""
    for table in COMPARING:
        TABLES[table](results)
    # of the test part
    found = [each for key, each in results.compared.items() if len(key) == 3]
    one_by_one = sum(each.is_resolved for each in found)
    all_together = sum(stats.survivors([each.p for each in found]))
    return markdown(
        ["differences", "clear one by one", "clear all together"],
        [[len(found), one_by_one, all_together]],
    )


TARGETS = [("LoRA all, r=8", "LoRA q v, r=8")]
PAIRS = [*TARGETS, ("LoRA all, r=16", "LoRA all, r=8")]
WHICH_PAIRS = [(name, "LoRA q v, r=4") for name in WHICH if name != "LoRA q v, r=4"]
RANK_PAIRS = [(f"LoRA q v, r={r}", "LoRA q v, r=8") for r in (1, 2, 4, 64)]
RANK_PAIRS.append(("LoRA q v, r=64", "LoRA q v, r=2"))
RANK_PAIRS.append(("LoRA q v, r=64", "LoRA q v, r=4"))
EMBEDDING_PAIRS = [(name, "LoRA all + embedding, r=8") for name in LARGER]
BEYOND_PAIRS = [(name, "LoRA all, r=8") for name in BEYOND]
TABLES: dict[str, Callable[[Results], str]] = {
    "grid": classifying.grid,
    "table2": partial(searched, task="reviews", names=MAIN),
    "table2-pairs": partial(pairs, jobs_of=on_reviews, compared=PAIRS),
    "table2-rates": partial(rates, task="reviews", names=MAIN),
    "table3": writing.written,
    "table3-rates": partial(
        rates, task="e2e", names=[name for name in E2E if name != "5-shot"]
    ),
    "table3-prompts": writing.prompted,
    "table5": partial(unsearched, names=WHICH),
    "table5-pairs": partial(pairs, jobs_of=at_one_rate, compared=WHICH_PAIRS),
    "table6": partial(unsearched, names=RANKS),
    "table6-pairs": partial(pairs, jobs_of=at_one_rate, compared=RANK_PAIRS),
    "table6-rates": partial(
        rates, task="reviews", names=["full", "LoRA q v, r=8"], epochs=1
    ),
    "table7": amplification,
    "beyond": partial(searched, task="reviews", names=["LoRA all, r=8", *BEYOND]),
    "beyond-pairs": partial(pairs, jobs_of=on_reviews, compared=BEYOND_PAIRS),
    "beyond-rates": partial(rates, task="reviews", names=BEYOND),
    "definitions": partial(searched, task="definitions", names=DEFINITIONS),
    "definitions-pairs": partial(pairs, jobs_of=on_definitions, compared=TARGETS),
    "definitions-rates": partial(rates, task="definitions", names=DEFINITIONS),
    "epochs": classifying.short,
    "epochs-reviews": partial(classifying.own_epochs, task="reviews"),
    "epochs-definitions": partial(classifying.own_epochs, task="definitions"),
    "epochs-losses": classifying.epoch_losses,
    "variants": partial(
        classifying.one_epoch, names=["LoRA all, r=8", *methods.VARIANTS]
    ),
    "embedding": partial(
        searched, task="reviews", names=["full", *EMBEDDING, *LARGER], epochs=1
    ),
    "embedding-pairs": partial(
        pairs, jobs_of=after_one_epoch, compared=EMBEDDING_PAIRS
    ),
    "embedding-rates": partial(
        rates, task="reviews", names=[*EMBEDDING, *LARGER], epochs=1
    ),
    "once": partial(rates, task="reviews", names=ONE_SEED, epochs=1),
    "whole": partial(
        classifying.one_epoch, names=["full", *EVERYTHING, *methods.WHOLE]
    ),
    "fresh": classifying.fresh,
    "forgotten": classifying.forgotten,
    "few": partial(classifying.few, by=nll),
    "few-by-accuracy": partial(classifying.few, by=mistakes),
    "few-rates": classifying.few_rates,
    "digits": reading.digits,
    "digits-rates": reading.digits_rates,
    "digits-lite2": reading.digits_of_larger_network,
    "digits-lite2-rates": reading.rates_of_larger_network,
    "prefix": partial(searched, task="reviews", names=PREFIX),
    "prefix-rates": partial(rates, task="reviews", names=PREFIX),
    "gpt3": gpt3,
    "costs-reviews": partial(costs, task="reviews"),
    "costs-e2e": partial(costs, task="e2e"),
    "overview": overview,
    "together": classifying.together,
    "verdicts": verdicts,
    "coverage": coverages,
}
COMPARING: tuple[str, ...] = (
    *(
        "table2",
        "table2-pairs",
        "together",
        "table3",
        "table5",
        "table5-pairs",
        "table6",
        "table6-pairs",
    ),
    *("beyond", "beyond-pairs", "definitions", "definitions-pairs"),
    *(
        "epochs",
        "few",
        "few-by-accuracy",
        "prefix",
        "digits",
        "digits-lite2",
        "embedding",
        "embedding-pairs",
    ),
)
"""Those with differences."""

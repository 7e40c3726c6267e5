"""Measure one framework, in its environment: ``python -m tests.frameworks.measure darts results/darts.json``."""

import json
import logging
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from lightning import seed_everything
from torch import Tensor

from lightning_lora import load_adapter, merge_adapters, unmerge_adapters
from lightning_lora.errors import LoRAWarning
from tests.frameworks.case import Case, Run, Way

State = dict[str, Tensor]
Facts = dict[str, Any]
SAVES = ("adapters", "model")
SMALL = 1e-3  # of what training changed: equal numbers, but for rounding


@dataclass
class Before:
    """The base, before any fit: its predictions and its weights."""

    numbers: Tensor
    state: State


def measure(case: Case, folder: Path) -> Facts:
    """Fit without LoRA and with both kinds of files.

    Return what works: "yes", or what came instead.
    """
    seed_everything(0, verbose=False)
    base = case.base(folder)
    before = Before(predicted(case, base), state(case, base))
    runs = {"plain": fit(case, folder / "plain")}
    facts = fit_with_lora(case, folder, runs)
    if case.resumes:
        facts |= resume_all(case, runs, before)
    facts["own"] = try_own_ways(case, runs, before)
    if "adapters" in runs:
        facts |= look_at_adapters(case, runs, before, folder)
    return facts


def fit_with_lora(case: Case, folder: Path, runs: dict[str, Run]) -> Facts:
    """Fit with both kinds of files. The runs that end are added to ``runs``."""
    facts: Facts = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for save in SAVES:

            def fit_and_add(save: str = save) -> None:
                runs[save] = fit(case, folder / save, save=save)

            facts[f"fit, {save}"] = attempt(fit_and_add)
    facts["warnings"] = texts_of_ours(caught)
    return facts


def texts_of_ours(caught: list[warnings.WarningMessage]) -> list[str]:
    """The warnings of this package, each once."""
    texts = set()
    for warning in caught:
        if issubclass(warning.category, LoRAWarning):
            texts.add(f"{warning.category.__name__}: {warning.message}")
    return sorted(texts)


def resume_all(case: Case, runs: dict[str, Run], before: Before) -> Facts:
    """Go on from the middle of each run with LoRA."""
    facts = {}
    for save in SAVES:
        if save in runs:
            facts[f"resume, {save}"] = attempt(
                partial(resume, case, runs[save], save, before.numbers)
            )
    return facts


def try_own_ways(
    case: Case, runs: dict[str, Run], before: Before
) -> dict[str, dict[str, str]]:
    """Save and load each run in each of the framework's own ways."""
    facts: dict[str, dict[str, str]] = {name: {} for name in case.ways()}
    for kind, run in runs.items():
        trained = predicted(case, run.model)
        for name, way in case.ways().items():
            facts[name][kind] = attempt(
                partial(try_own_way, case, way, run, trained, before.numbers)
            )
    return facts


def try_own_way(
    case: Case, way: Way, run: Run, trained: Tensor, numbers: Tensor
) -> str:
    """Compare what a way gives with the trained model."""
    return compare(predicted(case, way(run)), trained, numbers)


def look_at_adapters(
    case: Case, runs: dict[str, Run], before: Before, folder: Path
) -> Facts:
    """Look at the fit with the default kind of file: what moved, what the file has, and whether it loads."""
    run = runs["adapters"]
    return {
        "moves": moves(
            before.state, state(case, run.model), state(case, runs["plain"].model)
        ),
        "base in the file": look(case, run, before.state),
        "bytes": {kind: each.file.stat().st_size for kind, each in runs.items()},
        "load_adapter": attempt(lambda: adapt(case, run, folder, before.numbers)),
        "predictions": attempt(lambda: predict(case, run, before.numbers)),
    }


def fit(
    case: Case, folder: Path, seed: int = 1, file: Path | None = None, **lora: Any
) -> Run:
    """Fit a model that has the base's weights, or go on from a file."""
    seed_everything(seed, verbose=False)
    saves = import_module(f"{case.lightning}.callbacks").ModelCheckpoint
    # the mode tells it from a framework's own
    callbacks = [saves(folder, "{epoch}", save_top_k=-1, mode="max")]
    if lora:
        callbacks.append(case.lora(**lora))
    folder.mkdir()
    return Run(
        case.resume(file, callbacks, folder) if file else case.fit(callbacks, folder),
        folder,
    )


def attempt(act: Callable[[], Any]) -> str:
    """Return what came of it: its own words, "yes", or its error."""
    try:
        return act() or "yes"
    except Exception as error:
        return shorten(f"{type(error).__name__}: {beginning_of(str(error))}", 160)


def beginning_of(message: str) -> str:
    """The first line of a message, and the second if the first one ends with a colon."""
    first, _, others = message.partition("\n")
    if not first.endswith(":"):
        return first
    second, _, _ = others.partition("\n")
    return f"{first} {second}"


def state(case: Case, model: Any) -> State:
    """Copy the tensors of a model's state."""
    found = case.network(model).state_dict()
    return {
        name: value.clone()
        for name, value in found.items()
        if isinstance(value, Tensor)
    }


def compare(found: Tensor, expected: Tensor, base: Tensor) -> str:
    """Say whether numbers are the expected ones, to rounding, relative to what training changed."""
    change = distance(expected, base)
    off = distance(found, expected)
    rounding = SMALL * change + 1e-6 * float(expected.abs().max())
    if change <= rounding:
        return "no: training changed nothing"
    if off <= rounding:
        return "yes"
    if distance(found, base) <= rounding:
        return "no: the base's numbers"
    return f"no: other numbers, off by {off / change:.0%} of what training changed"


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())


def resume(case: Case, through: Run, save: str, numbers: Tensor) -> str:
    """Compare the bits of a run that goes on from the middle with one that never stopped."""
    again = fit(
        case,
        through.folder.with_name(f"resumed-{save}"),
        seed=2,
        file=through.middle,
        save=save,
    )
    once = state(case, through.model)
    twice = state(case, again.model)
    if once.keys() != twice.keys():
        return f"no: other names, such as {min(once.keys() ^ twice.keys())}"
    if not changed(once, twice, once):
        return "yes"
    found = compare(
        predicted(case, again.model), predicted(case, through.model), numbers
    )
    return "to rounding" if found == "yes" else found


def moves(start: State, with_lora: State, plain: State) -> dict[str, Any]:
    """Name the matrices that move only with LoRA, or only without it."""
    names = [name for name in matrices(start) if name in with_lora and name in plain]
    lora = changed(start, with_lora, names)
    full = changed(start, plain, names)
    return {
        "only with": sorted(lora - full),
        "only without": sorted(full - lora),
        "both": len(lora & full),
    }


def changed(one: State, other: State, names: Iterable[str]) -> set[str]:
    """Name the tensors that differ."""
    return {name for name in names if not torch.equal(one[name], other[name])}


def matrices(start: State) -> list[str]:
    """Name the tensors of two or more dimensions."""
    return [name for name, value in start.items() if value.ndim > 1]


def look(case: Case, run: Run, start: State) -> list[str]:
    """Name the matrices of the base in the file.

    Those that changed, or look untrained, belong there.
    """
    saved = torch.load(run.file, weights_only=False, map_location="cpu")["state_dict"]
    trained_whole = tuple(case.lora().config.modules_to_save or ())
    names = []
    for name in matrices(start):
        if case.prefix + name in saved and not name.startswith(trained_whole):
            names.append(name)
    return names


def adapt(case: Case, run: Run, folder: Path, numbers: Tensor) -> str:
    """Load a run's adapters into a new base, and compare."""
    model = case.base(folder)
    load_adapter(case.network(model), run.file)
    return compare(predicted(case, model), predicted(case, run.model), numbers)


@torch.no_grad()
def predicted(case: Case, model: Any) -> Tensor:
    """The numbers of a model as its users have it after a fit."""
    case.network(model).eval()
    return case.predict(model)


def predict(case: Case, run: Run, numbers: Tensor) -> str:
    """Compare merged weights with adapters."""
    module = case.remembers(run.model)
    merged = predicted(case, run.model)
    unmerge_adapters(module)
    adapted = predicted(case, run.model)
    merge_adapters(module)
    return compare(adapted, merged, numbers)


def versions(name: str) -> dict[str, str]:
    """The versions of Python, of the framework and of what it stands on."""
    installed = {
        each.metadata["Name"].replace("_", "-"): each.version
        for each in distributions()
    }
    packages = (name, "torch", "lightning", "pytorch-lightning", "lightning-lora")
    found = {
        package: installed[package] for package in packages if package in installed
    }
    return {"python": platform.python_version(), **found}


def main(name: str, path: str) -> None:
    """Measure each model of a framework, and write the file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases = import_module(f"tests.frameworks.cases.{name.replace('-', '_')}").CASES
    models = {}
    for title, case in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            models[title] = measure(case(), Path(folder))
        print(f"{name}, {title}: {json.dumps(models[title], indent=1)}")
    found = {
        "date": date.today().isoformat(),
        "versions": versions(name),
        "models": models,
    }
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

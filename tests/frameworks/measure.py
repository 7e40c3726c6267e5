"""Measure one framework, in its environment: ``python -m tests.frameworks.measure darts results/darts.json``."""

import json
import logging
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import date
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
from tests.frameworks.case import Case, Run

State = dict[str, Tensor]
SAVES = ("adapters", "model")
SMALL = 1e-3  # of what training changed: equal numbers, but for rounding


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Fit without LoRA and with both kinds of files. Return what works: "yes", or what came instead."""
    seed_everything(0, verbose=False)
    base = case.base(folder)
    numbers, start = predicted(case, base), state(case, base)
    runs, facts = {"plain": fit(case, folder / "plain")}, dict[str, Any]()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for save in SAVES:
            facts[f"fit, {save}"] = attempt(lambda save=save: runs.update({save: fit(case, folder / save, save=save)}))
    ours = [warning for warning in caught if issubclass(warning.category, LoRAWarning)]
    facts["warnings"] = sorted({f"{warning.category.__name__}: {warning.message}" for warning in ours})
    for save in SAVES:
        if case.resumes and (run := runs.get(save)):
            facts[f"resume, {save}"] = attempt(lambda run=run, save=save: resume(case, run, save, numbers))
    facts["own"] = {name: {} for name in case.ways()}
    for kind, run in runs.items():
        trained = predicted(case, run.model)
        for name, way in case.ways().items():
            facts["own"][name][kind] = attempt(lambda: compare(predicted(case, way(run)), trained, numbers))  # noqa: B023
    if run := runs.get("adapters"):
        ends = [state(case, each.model) for each in (run, runs["plain"])]
        facts["moves"] = moves(start, *ends)
        facts["base in the file"] = look(case, run, start)
        facts["bytes"] = {kind: each.file.stat().st_size for kind, each in runs.items()}
        facts["load_adapter"] = attempt(lambda: adapt(case, run, folder, numbers))
        facts["predictions"] = attempt(lambda: predict(case, run, numbers))
    return facts


def fit(case: Case, folder: Path, seed: int = 1, file: Path | None = None, **lora: Any) -> Run:
    """Fit a model that has the base's weights, or go on from a file."""
    seed_everything(seed, verbose=False)
    saves = import_module(f"{case.lightning}.callbacks").ModelCheckpoint
    callbacks = [saves(folder, "{epoch}", save_top_k=-1, mode="max")]  # the mode tells it from a framework's own
    if lora:
        callbacks.append(case.lora(**lora))
    folder.mkdir()
    return Run(case.resume(file, callbacks, folder) if file else case.fit(callbacks, folder), folder)


def attempt(act: Callable[[], Any]) -> str:
    """Return what came of it: its own words, "yes", or its error."""
    try:
        return act() or "yes"
    except Exception as error:
        first, *others = str(error).split("\n") if str(error) else [""]
        return shorten(" ".join([f"{type(error).__name__}:", first, *others[: first.endswith(":")]]), 160)


def state(case: Case, model: Any) -> State:
    found = case.network(model).state_dict()
    return {name: value.clone() for name, value in found.items() if isinstance(value, Tensor)}


def compare(found: Tensor, expected: Tensor, base: Tensor) -> str:
    """Say whether numbers are the expected ones, to rounding, relative to what training changed."""
    pairs = (expected, base), (found, expected), (found, base)
    change, off, from_base = (float((a - b).abs().max()) for a, b in pairs)
    rounding = SMALL * change + 1e-6 * float(expected.abs().max())
    if change <= rounding:
        return "no: training changed nothing"
    if off <= rounding:
        return "yes"
    if from_base <= rounding:
        return "no: the base's numbers"
    return f"no: other numbers, off by {off / change:.0%} of what training changed"


def resume(case: Case, through: Run, save: str, numbers: Tensor) -> str:
    """Compare the bits of a run that goes on from the middle with one that never stopped."""
    again = fit(case, through.folder.with_name(f"resumed-{save}"), seed=2, file=through.middle, save=save)
    one, other = state(case, through.model), state(case, again.model)
    if one.keys() != other.keys():
        return f"no: other names, such as {min(one.keys() ^ other.keys())}"
    if all(torch.equal(value, other[name]) for name, value in one.items()):
        return "yes"
    found = compare(predicted(case, again.model), predicted(case, through.model), numbers)
    return "to rounding" if found == "yes" else found


def moves(start: State, *ends: State) -> dict[str, Any]:
    """Name the matrices that move only with LoRA, or only without it."""
    known = [name for name in matrices(start) if all(name in end for end in ends)]
    lora, plain = ({name for name in known if not torch.equal(start[name], end[name])} for end in ends)
    return {"only with": sorted(lora - plain), "only without": sorted(plain - lora), "both": len(lora & plain)}


def matrices(start: State) -> list[str]:
    return [name for name, value in start.items() if value.ndim > 1]


def look(case: Case, run: Run, start: State) -> list[str]:
    """Name the matrices of the base in the file. Those that changed, or look untrained, belong there."""
    held = torch.load(run.file, weights_only=False, map_location="cpu")["state_dict"]
    whole = tuple(case.lora().config.modules_to_save or ())
    return [name for name in matrices(start) if case.prefix + name in held and not name.startswith(whole)]


def adapt(case: Case, run: Run, folder: Path, numbers: Tensor) -> str:
    model = case.base(folder)
    load_adapter(case.network(model), run.file)
    return compare(predicted(case, model), predicted(case, run.model), numbers)


def predicted(case: Case, model: Any) -> Tensor:
    case.network(model).eval()
    with torch.no_grad():
        return case.predict(model)


def predict(case: Case, run: Run, numbers: Tensor) -> str:
    """Compare merged weights with adapters."""
    module, merged = case.remembers(run.model), predicted(case, run.model)
    unmerge_adapters(module)
    adapted = predicted(case, run.model)
    merge_adapters(module)
    return compare(adapted, merged, numbers)


def versions(name: str) -> dict[str, str]:
    installed = {each.metadata["Name"].replace("_", "-"): each.version for each in distributions()}
    packages = (name, "torch", "lightning", "pytorch-lightning", "lightning-lora")
    return {"python": platform.python_version(), **{each: installed[each] for each in packages if each in installed}}


def main(name: str, path: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    models = {}
    for title, kind in import_module(f"tests.frameworks.cases.{name.replace('-', '_')}").CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            models[title] = measure(kind(), Path(folder))
        print(f"{name}, {title}: {json.dumps(models[title], indent=1)}")
    found = {"date": date.today().isoformat(), "versions": versions(name), "models": models}
    Path(path).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

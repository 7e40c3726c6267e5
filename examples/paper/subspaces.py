"""Figures 3 and 4 and table 7 of the paper: which directions the adapters of table 6 learned."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters, load_adapter
from lightning_lora.metrics import Amplification, SubspaceSimilarity

from .jobs import Job, Result
from .minilm import CLASSES, WEIGHTS, Classifier

PARTS = {"q": "query", "v": "value"}
SHOWN = 32  # directions in a figure, as in the paper
INKS = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


def subspaces(small: Job, large: Job, other_seed: Job, adapters: Path) -> Result:
    """Return the grids of figures 3 and 4, as means over layers, and the numbers of table 7.

    Args:
        small: Trained with a low rank.
        large: With a high rank, and with another seed: with the same one, the first rows of A would begin alike.
        other_seed: As ``large``, with another seed.
        adapters: The folder of their adapters.
    """
    paths = [adapters / f"{job.name}.safetensors" for job in (small, large, other_seed)]
    random = fresh(0), fresh(1)
    return {
        "ranks": similarity(paths[0], paths[1]),
        "seeds": similarity(paths[1], paths[2]),
        "random": similarity(*random),
        "amplification": [amplification(job, path) for job, path in zip((small, large), paths, strict=False)],
    }


def fresh(seed: int) -> nn.Module:
    """Return a model with adapters that have not been trained: their A is random."""
    model = Classifier(CLASSES["reviews"], 0.0)
    seed_everything(seed, verbose=False)
    inject_adapters(model, LoRAConfig(r=64, target_modules=[WEIGHTS[name] for name in PARTS]))
    return model


def similarity(one: Any, other: Any) -> dict[str, list[list[float]]]:
    """Return a grid of similarities for each kind of weight: the mean over layers."""
    metric = SubspaceSimilarity()
    metric.update(one, other)
    grids: Any = metric.compute()
    found = {}
    for part in PARTS.values():
        mean = torch.stack([grid for name, grid in grids.items() if name.endswith(part)]).mean(0)
        found[part] = [[round(value, 3) for value in row] for row in mean[:SHOWN, :SHOWN].tolist()]
    return found


def amplification(job: Job, path: Path) -> Result:
    """Return the norms of table 7 for the query weights: the mean over layers."""
    model = Classifier(CLASSES[job.task], job.lr)
    load_adapter(model, path)
    found: Result = {"method": job.method}
    for directions in ("update", "weight", "random"):
        metric = Amplification(directions)
        metric.update(model)
        norms = torch.tensor([values for name, values in metric.norms.items() if name.endswith("query")]).mean(0)
        found[directions] = [round(value, 3) for value in norms.tolist()]
    return found


def draw(result: Result, folder: Path) -> None:
    """Draw figures 3 and 4."""
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    gray: Any = dict.fromkeys(INKS, "gray")  # readable on light and on dark pages
    for name, rows, columns in (("ranks", "r=8", "r=64"), ("seeds", "one seed", "another seed")):
        panels = dict(result[name])
        if name == "seeds":
            panels["random"] = result["random"]["query"]
        with plt.rc_context(gray):
            figure, axes = plt.subplots(1, len(panels), figsize=(3.4 * len(panels) + 1, 3.2), layout="constrained")
            for axis, (title, grid) in zip(axes, panels.items(), strict=True):
                ends = (0.5, len(grid[0]) + 0.5, len(grid) + 0.5, 0.5)
                image = axis.imshow(grid, vmin=0, vmax=1, extent=ends, aspect="auto", interpolation="nearest")
                axis.set(title=title, xlabel=f"first j directions, {columns}", ylabel=f"first i directions, {rows}")
            figure.colorbar(image, ax=axes)
            figure.savefig(folder / f"{name}.png", dpi=100, transparent=True)
            plt.close(figure)

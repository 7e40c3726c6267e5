"""Figures 3 and 4 and table 7 of the paper: which directions the adapters of table 6 learned."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

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
        large: With a high rank, and with another seed: with the same one, the first
            rows of A would begin alike.
        other_seed: As ``large``, with another seed.
        adapters: The folder of their adapters.
    """
    of_small = adapters / f"{small.name}.safetensors"
    of_large = adapters / f"{large.name}.safetensors"
    of_other_seed = adapters / f"{other_seed.name}.safetensors"
    return {
        "ranks": similarity(of_small, of_large),
        "seeds": similarity(of_large, of_other_seed),
        "random": similarity(fresh(0), fresh(1)),
        "amplification": [
            amplification(small, of_small),
            amplification(large, of_large),
        ],
    }


def fresh(seed: int) -> nn.Module:
    """Return a model with adapters that have not been trained: their A is random."""
    model = Classifier(CLASSES["reviews"], 0.0)
    seed_everything(seed, verbose=False)
    targets = [WEIGHTS[name] for name in PARTS]
    inject_adapters(model, LoRAConfig(r=64, target_modules=targets))
    return model


def similarity(one: Any, other: Any) -> dict[str, list[list[float]]]:
    """Return a grid of similarities for each kind of weight: the mean over layers."""
    metric = SubspaceSimilarity()
    metric.update(one, other)
    grids: Any = metric.compute()
    found = {}
    for part in PARTS.values():
        of_layers = [grid for name, grid in grids.items() if name.endswith(part)]
        mean = torch.stack(of_layers).mean(0)
        found[part] = list(map(rounded, mean[:SHOWN, :SHOWN]))
    return found


def rounded(values: Tensor) -> list[float]:
    """Return numbers as files hold them."""
    return [round(value, 3) for value in values.tolist()]


def amplification(job: Job, path: Path) -> Result:
    """Return the norms of table 7 for the query weights: the mean over layers."""
    model = Classifier(CLASSES[job.task], job.lr)
    load_adapter(model, path)
    found: Result = {"method": job.method}
    for directions in ("update", "weight", "random"):
        metric = Amplification(directions)
        metric.update(model)
        of_layers = [
            norms for name, norms in metric.norms.items() if name.endswith("query")
        ]
        found[directions] = rounded(torch.tensor(of_layers).mean(0))
    return found


def draw(result: Result, folder: Path) -> None:
    """Draw figures 3 and 4."""
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    gray: Any = dict.fromkeys(INKS, "gray")  # readable on light and on dark pages
    for name, rows, columns in (
        ("ranks", "r=8", "r=64"),
        ("seeds", "one seed", "another seed"),
    ):
        panels = dict(result[name])
        if name == "seeds":
            panels["random"] = result["random"]["query"]
        with plt.rc_context(gray):
            figure = draw_grids(panels, rows, columns)
            figure.savefig(folder / f"{name}.png", dpi=100, transparent=True)
            plt.close(figure)


def draw_grids(panels: dict[str, list[list[float]]], rows: str, columns: str) -> Any:
    """Return a figure with grids side by side, by their titles."""
    from matplotlib import pyplot as plt

    size = (3.4 * len(panels) + 1, 3.2)
    figure, axes = plt.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (title, grid) in zip(axes, panels.items(), strict=True):
        height, width = len(grid), len(grid[0])
        ends = (0.5, width + 0.5, height + 0.5, 0.5)
        image = axis.imshow(
            grid, vmin=0, vmax=1, extent=ends, aspect="auto", interpolation="nearest"
        )
        axis.set_title(title)
        axis.set(
            xlabel=f"first j directions, {columns}",
            ylabel=f"first i directions, {rows}",
        )
    figure.colorbar(image, ax=axes)
    return figure

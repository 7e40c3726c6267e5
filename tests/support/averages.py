"""Callbacks that average, and what their averages are."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from packaging.version import Version
from torch import Tensor

PLAIN_SWALR = Version(torch.__version__) >= Version("2.6")  # its state could not be loaded safely before


def mean(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in states]).mean(0) for name in states[0]}


def moving(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    average = states[0]
    for each in states[1:]:
        average = {name: 0.9 * value + 0.1 * each[name] for name, value in average.items()}
    return average


# The companion; the average at the end of four epochs of four steps; what validation sees after the first
AVERAGES: dict[str, tuple[Callable[[], L.Callback], Callable[[Any], Any], Callable[[Any], Any]]] = {}
if PLAIN_SWALR:
    AVERAGES["swa"] = (
        lambda: StochasticWeightAveraging(0.1, swa_epoch_start=2),
        lambda after: mean(after[3:12:4]),  # as each epoch from the second on begins
        lambda after: after[3],  # it moves to the average when all is over
    )
if hasattr(bundled, "WeightAveraging"):
    AVERAGES["mean"] = (bundled.WeightAveraging, mean, lambda after: mean(after[:4]))
if hasattr(bundled, "EMAWeightAveraging"):
    AVERAGES["ema"] = (lambda: bundled.EMAWeightAveraging(decay=0.9), moving, lambda after: moving(after[:4]))

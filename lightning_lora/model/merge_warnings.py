"""Warnings after a merge: broken ties, overflow, lost updates."""

import math
import warnings
from collections.abc import Mapping, Sequence

from torch import nn

from lightning_lora.errors import LoRAWarning, MergePrecisionWarning, listed
from lightning_lora.model.view import View

_MUCH = 0.25
"""A warning is shown if a larger share of an update (in norm) is lost. In bfloat16, 0.1 to 0.2 is common."""


def warn_of_divergence(view: View) -> None:
    """Warn of adapters that hold NaN or infinite values.

    Warns:
        LoRAWarning: there are such adapters.
    """
    if broken := view.diverged():
        warnings.warn(
            f"{listed(broken)} of {type(view.model).__name__} hold NaN or infinite values: the training has diverged. "
            "The merged weights hold them too. Call unmerge_adapters(model) for the base, and train again with a lower "
            "learning rate.",
            LoRAWarning,
            stacklevel=4,
        )


def warn_of_merge(model: nn.Module, lost: Mapping[str, float], untied: Sequence[str]) -> None:
    """Warn of problems in a merge.

    Args:
        model: The merged model.
        lost: The share of each layer's update that is lost to rounding.
        untied: The layers whose weights are no longer tied.

    Warns:
        LoRAWarning: a tied weight is no longer tied.
        MergePrecisionWarning: values overflowed, or rounding lost much of an update.
    """
    title = type(model).__name__
    if untied:
        warnings.warn(
            f"The weight of {listed(untied)} in {title} was tied to another layer's. The merge does not change the "
            "other layer, so they are two weights now. Their state dict loads correctly only into a model where they "
            "are not tied (in transformers, config.tie_word_embeddings=False).",
            LoRAWarning,
            stacklevel=3,
        )
    overflown = [name for name, share in lost.items() if not share < math.inf]
    if overflown:
        warnings.warn(
            f"Merging gave values that the dtype of {listed(overflown)} in {title} cannot hold: the weights are "
            "infinite now. Call unmerge_adapters(model), and convert the model to float32 or bfloat16 before merging.",
            MergePrecisionWarning,
            stacklevel=3,
        )
    if loss := lost_to_rounding(lost, title):
        warnings.warn(
            f"{loss} Keep the adapters on their layers (merge=False, unmerge_adapters), or convert the model to "
            "float32 before merging.",
            MergePrecisionWarning,
            stacklevel=3,
        )


def lost_to_rounding(lost: Mapping[str, float], title: str) -> str:
    """Return what a warning says of rounded updates.

    Args:
        lost: The share of each layer's update that is lost to rounding.
        title: What was merged into.

    Returns:
        Two sentences, or nothing if rounding took little.
    """
    much = {name: share for name, share in lost.items() if _MUCH < share < math.inf}
    if not much:
        return ""
    worst = max(much, key=much.__getitem__)
    return (
        f"Merging rounded away {much[worst]:.0%} of the update of {worst!r} in {title}, and more than {_MUCH:.0%} in "
        f"{len(much)} of {len(lost)} layers: half-precision weights cannot hold changes so small. The merged model has "
        "lost this part of the fine-tuning."
    )

"""Tell the user what trains too little in a fit."""

import warnings

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.errors import FreshLayerWarning, LoRAWarning, listed
from lightning_lora.model.fresh import Fresh, find_fresh
from lightning_lora.model.leftovers import left_alone, left_computed, left_trainable
from lightning_lora.model.remember import view_of
from lightning_lora.model.view import View
from lightning_lora.targets.lookup import COMPUTED

_MOST = 0.5
"""More than this share of the weights is most of a model."""


def advise(model: nn.Module) -> None:
    """Warn of layers that train too little for the task.

    Nothing is said about a model whose adapters are trained already.

    Args:
        model: The adapted module, before its first step.

    Warns:
        FreshLayerWarning: layers look untrained, and would stay random.
        LoRAWarning: what the user left trainable is frozen, or the targets leave most of the weights alone, or layers
            whose weight is computed.
    """
    view = view_of(model)
    if not view.is_fresh():
        return
    fresh = find_fresh(view)
    if fresh.share > _MOST:
        _tell_of_random_model(view, fresh)
    elif fresh.random:
        _warn_of_fresh(view, fresh)
    _warn_of_left_trainable(view, fresh)
    _warn_of_left_alone(view)
    _warn_of_computed(view)


def _tell_of_random_model(view: View, fresh: Fresh) -> None:
    rank_zero_info(
        f"{fresh.share:.0%} of the weights of {type(view.model).__name__} look untrained. Adapters on random weights "
        "learn little: load pretrained weights first, or train without LoRACallback."
    )


def _warn_of_fresh(view: View, fresh: Fresh) -> None:
    title, remedy = type(view.model).__name__, f"Train them in full: {_to_save(view, fresh.random)}"
    if fresh.adapted:
        found = f"The only layers of {title} that are adapted look untrained: {listed(fresh.adapted)}."
        remedy += ', and adapt other layers, for example by target_modules="all"'
    else:
        found = (
            f"Layers of {title} that look untrained: {listed(fresh.random)}. Their weights are frozen: they would stay "
            "random. A saved file does not contain them, so it could not be loaded into a newly built model."
        )
    warnings.warn(
        f"{found} Their values are those of an initialisation. {remedy}. (If they are random on purpose, ignore "
        "FreshLayerWarning.)",
        FreshLayerWarning,
        stacklevel=1,
    )


def _warn_of_left_trainable(view: View, fresh: Fresh) -> None:
    left = [name for name in left_trainable(view) if name not in fresh.random]
    if left:
        warnings.warn(
            f"You have frozen most of {type(view.model).__name__}, but not {listed(left)}. Now these are frozen too, "
            f"because no adapter is inside them. To train them in full: {_to_save(view, left)}.",
            LoRAWarning,
            stacklevel=1,
        )


def _warn_of_left_alone(view: View) -> None:
    layers, kinds, share = left_alone(view)
    if share > _MOST:
        warnings.warn(
            f'target_modules="all-linear" leaves {share:.0%} of the weights of {type(view.model).__name__} without '
            f"adapters. They are in {', '.join(kinds)} layers, which can be adapted too: {listed(layers)}. Use "
            'target_modules="all", or name the layers to adapt.',
            LoRAWarning,
            stacklevel=1,
        )


def _warn_of_computed(view: View) -> None:
    left = left_computed(view)
    if left:
        warnings.warn(
            f"{listed(left)} of {type(view.model).__name__} have no adapter, because their weight is {COMPUTED}: no "
            "update could be merged into it. They stay frozen. To adapt them, undo that first. To train them in full: "
            f"{_to_save(view, left)}.",
            LoRAWarning,
            stacklevel=1,
        )


def _to_save(view: View, names: list[str] | tuple[str, ...]) -> str:
    """The argument to write, with what it already lists."""
    return f"modules_to_save={list(dict.fromkeys([*(view.config.modules_to_save or ()), *names]))}"

"""Gradient hooks on weights that have adapters.

Such a hook masks or scales what a weight learns. A frozen weight has no gradient, so
the hook never runs, and the update moves what the hook protects.
"""

from weakref import WeakKeyDictionary

from torch import nn

from lightning_lora.errors import listed, warn
from lightning_lora.guards.wording import MOST_NAMES, in_full_or_excluded
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.private import has_gradient_hooks
from lightning_lora.tensors.dicts import where, without
from lightning_lora.tensors.names import own_parameter

_NAMED: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()
"""The layers that were named already, of each model: its adapters may come by several calls, before a fit looks too."""


class HookedWeights(Guard):
    """Names adapted layers of a model whose weights have gradient hooks, once."""

    def injected_by_call(self, view: View) -> None:
        """Name those that have hooks now."""
        self._name(view)

    def adapters_ready(self, view: View) -> None:
        """Name those that have got hooks since."""
        self._name(view)

    def _name(self, view: View) -> None:
        """Name those that were not named before."""
        already_named = _NAMED.setdefault(view.model, set())
        names = list(where(without(view.layers, already_named), _has_hooked_weight))
        if names:
            already_named.update(names)
            warn(_about_hooks(view.title, names))


def _has_hooked_weight(layer: LoRALayer) -> bool:
    """Whether a weight that has an update has a gradient hook."""
    weights = [own_parameter(layer, name) for name in layer.lora_weights()]
    return any(map(has_gradient_hooks, weights))


def _about_hooks(title: str, names: list[str]) -> str:
    """What is said of gradient hooks on these layers' weights."""
    return (
        f"The weights of {listed(names, MOST_NAMES)} of {title} have gradient hooks, "
        "which never run now: the weights are frozen, and what the hooks mask or scale "
        "is no part of the updates. Train these layers in full: "
        f"{in_full_or_excluded(names)} If the hooks only watch, nothing else is "
        "missing."
    )

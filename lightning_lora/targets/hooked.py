"""Gradient hooks on weights that have adapters.

Such a hook masks or scales what a weight learns. A frozen weight has no gradient, so the hook never runs, and the
update moves what the hook protects.
"""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn

from lightning_lora.errors import listed, warn
from lightning_lora.layers import LoRALayer
from lightning_lora.private import has_gradient_hooks
from lightning_lora.tensors.names import own_parameter, plain_module

_MOST_NAMES = 5
_TOLD: "WeakKeyDictionary[nn.Module, set[str]]" = WeakKeyDictionary()
"""The layers that were named, of each model."""


def warn_of_hooks(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Name adapted layers of a model whose weights have gradient hooks, once."""
    told = _TOLD.setdefault(plain_module(model), set())
    names = [name for name in _hooked(layers) if name not in told]
    if names:
        told.update(names)
        asked = str(names) if len(names) <= _MOST_NAMES else "[...]"
        title = type(plain_module(model)).__name__
        warn(
            f"The weights of {listed(names, _MOST_NAMES)} of {title} have gradient hooks, which never run now: "
            "the weights are frozen, and what the hooks mask or scale is no part of the updates. Train these layers in "
            f"full: modules_to_save={asked}. Or leave them out: exclude_modules={asked}. If the hooks only watch, "
            "nothing else is missing."
        )


def _hooked(layers: Mapping[str, LoRALayer]) -> list[str]:
    """The layers with a hook on a weight that has an update."""
    found = []
    for name, layer in layers.items():
        weights = [own_parameter(layer, weight) for weight in layer.lora_weights()]
        if any(has_gradient_hooks(weight) for weight in weights):
            found.append(name)
    return found

"""Attach adapters to layers of a model, and detach them."""

from collections.abc import Collection, Mapping

import torch
from torch import nn

from lightning_lora.errors import AdapterStateError
from lightning_lora.layers import (
    LayerAdapter,
    LoRALayer,
    adapter_for,
    put_on,
    tie_layers,
)
from lightning_lora.layers.bypasses import update_bypasses
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.own_loop.early_optimizers import (
    note_detached_adapter,
    watch_optimizers,
)
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import only


def attach_adapters(view: View, adapters: Mapping[str, LayerAdapter]) -> None:
    """Attach adapters to layers of a model, by the names of the layers."""
    for name, adapter in adapters.items():
        put_on(view.modules[name], adapter)
    update_for_changed_layers(view)
    watch_optimizers(view.model)


def detach_adapters(view: View) -> dict[str, LayerAdapter]:
    """Remove the adapters from all layers. Return them by the names of their layers."""
    return detach_from(view, view.layers)


def detach_from(view: View, names: Collection[str]) -> dict[str, LayerAdapter]:
    """Remove the adapters from these layers.

    Return them by the names of their layers.
    """
    refuse_computed_weights(view)
    adapters = {}
    for name, layer in only(view.layers, names).items():
        adapters[name] = layer.lora_detach()
        note_detached_adapter(view, name, adapters[name])
    update_for_changed_layers(view)
    return adapters


def update_for_changed_layers(view: View) -> None:
    """Bring up to date what depends on which layers are adapted: ties, bypasses, and what the view has seen."""
    tie_layers(view.modules.values())
    update_bypasses(view.modules)
    view.look_again()


def reinitialise_if_base_changed(view: View) -> None:
    """Initialise adapters again that start from the base's weights, if these have changed.

    An adapter that has learned stays.
    """
    for layer in view.layers.values():
        layer.lora_initialise_if_base_changed()


def reattach_to_replaced(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Take the adapters of these layers that were replaced since, and attach them to the new layers."""
    view = View(model)
    for name, layer in layers.items():
        # this layer was not replaced, or the new one has an adapter already
        if isinstance(view.modules[name], LoRALayer):
            continue
        kind = _kind_of_replaced(view, name)
        adapter = layer.lora_detach()
        adapter.kind = kind
        attach_adapters(view, {name: adapter})


def _kind_of_replaced(view: View, name: str) -> type[LoRALayer]:
    """The adapter class for a layer that took another one's place."""
    layer = view.modules[name]
    kind = adapter_for(layer)
    if kind is None or kind.lora_refusal(layer):
        raise AdapterStateError(
            f"{name!r} of {view.title} was replaced by a {type(layer).__name__}, which "
            "cannot be adapted. Leave it out of the conversion, or of the adapters: "
            "exclude_modules."
        )
    return kind


def update_for_changed_weights(view: View) -> None:
    """Drop what was computed from the earlier weights of adapted layers."""
    torch.clear_autocast_cache()  # the cache may hold copies of earlier weights
    for layer in view.layers.values():
        layer.lora_weights_changed()

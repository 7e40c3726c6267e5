"""Copies of networks, which other code moves after their originals: their adapters follow those of the originals.

Such as a momentum network, which an average of its original's weights moves. Three moments:

- Adapters come, or the optimizers are known: the copies are in the record, and :func:`follow_originals`.
- A training begins: other code may have copied a network with its adapters (:func:`follow_new_copies`).
- The first step is over: a network without a gradient may be such a copy, or one that trains later. Nobody can know,
  so it only begins with its original's values (:func:`begin_as_originals`).
"""

from collections.abc import Mapping, Set
from dataclasses import replace

from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.networks.copies import find_copies
from lightning_lora.networks.roles import StillNetworks
from lightning_lora.tensors.named import modules_around, only, with_values, without
from lightning_lora.tensors.names import owner_of


def follow_originals(view: View) -> None:
    """Let the adapters of copies follow those of their originals. Before they train, both have the same values."""
    originals = _original_layers(view, view.adapter.networks)
    for name, original in originals.items():
        view.layers[name].lora_follow(original)
    if view.adapter.is_trained:
        return
    for layer in without(view.layers, originals).values():
        if not layer.lora_settings.trains and layer.lora_is_fresh():  # one that has learned may be paused
            layer.lora_train_again()


def follow_new_copies(view: View, new_layers: Set[str]) -> None:
    """Note the networks of new layers that copy others, and let them follow."""
    before = view.adapter.networks
    copies = {**before.copies, **copies_among(view, new_layers)}
    view.adapter.networks = replace(before, copies=copies)
    follow_originals(view)


def begin_as_originals(view: View, copies: Mapping[str, str], layers: Set[str]) -> None:
    """Give these layers the values of their originals' adapters, while both updates are zero.

    Then other code may move a copy as it moves the base. A copy that trains later, such as an expert, is free to.
    """
    originals = _original_layers(view, StillNetworks(copies=copies))
    for name, layer in only(view.layers, layers & originals.keys()).items():
        layer.lora_begin_as(originals[name])


def copies_among(view: View, idle: Set[str]) -> dict[str, str]:
    """Return the networks of idle layers that copy one of other layers."""
    if not idle:
        return {}
    busy = modules_around(without(view.layers, idle))
    still = {parameter for name, parameter in view.base.items() if owner_of(name) not in busy}
    return find_copies(view.modules, view.base, view.layers.keys(), still)


def _original_layers(view: View, networks: StillNetworks) -> dict[str, LoRALayer]:
    """The adapted layers that layers of copies follow, by the names of these."""
    originals = networks.originals_of(view.layers)
    adapted = with_values(originals, view.layers)
    return {name: view.layers[original] for name, original in adapted.items()}

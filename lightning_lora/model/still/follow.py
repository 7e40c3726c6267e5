"""Copies of networks, which other code moves after their originals: their adapters follow those of the originals.

A momentum network is such a copy: its weights are an average of the original's. There
are three moments:

- Adapters come, or the optimizers become known: the copies in the record follow
  (:func:`follow_originals`).
- A training begins: other code may have copied a network with its adapters since
  (:func:`follow_new_copies`).
- A first step is over: a copy without a gradient may be moved by other code, or may
  train later, as an expert. Nobody can know, so it does not follow, but begins with its
  original's adapter (:func:`begin_as_originals`).
"""

from collections.abc import Mapping, Set
from dataclasses import replace

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.networks.copies import find_copies
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.tensors.dicts import only, with_values, without
from lightning_lora.tensors.names import modules_around, owner_of


def follow_originals(view: View) -> None:
    """Let the adapters of copies follow those of their originals, and those of former copies train.

    Before they train, a copy's adapter and its original's have the same values.
    """
    originals = _original_layers(view, view.adapter.networks)
    for name, original in originals.items():
        view.layers[name].lora_follow(original)
    # once adapters have learned, one that does not train may be paused, or a sum
    if not view.adapter.may_have_learned:
        _train_former_copies(without(view.layers, originals))


def _train_former_copies(layers: Mapping[str, LoRALayer]) -> None:
    """Let fresh adapters train again which have followed until now: these layers follow nothing."""
    for layer in layers.values():
        if not layer.lora_settings.trains and layer.lora_is_fresh():
            layer.lora_train_again()


def follow_new_copies(view: View, new_layers: Set[str]) -> None:
    """Note the networks of new layers that copy networks of other layers, and let them follow."""
    before = view.adapter.networks
    copies = {**before.copies, **copies_among(view, new_layers)}
    view.adapter.networks = replace(before, copies=copies)
    follow_originals(view)


def begin_as_originals(view: View, copies: Mapping[str, str], layers: Set[str]) -> None:
    """Give those of these layers that are in copies the values of their originals' adapters, while neither has learned.

    They still train by themselves: other code may move a copy's adapter with its
    weights, or the copy may train later.
    """
    originals = _original_layers(view, StillNetworks(copies=copies))
    for name, original in only(originals, layers).items():
        view.layers[name].lora_begin_as(original)


def copies_among(view: View, layers: Set[str]) -> dict[str, str]:
    """Return the networks of these layers that copy a network of the other layers."""
    if not layers:
        return {}
    # copies are looked for among what stands still: here, that is what no other layer has
    around_other_layers = modules_around(without(view.layers, layers))
    still_parameters = set[nn.Parameter]()
    for name, parameter in view.base_parameters.items():
        if owner_of(name) not in around_other_layers:
            still_parameters.add(parameter)
    return find_copies(
        view.modules, view.base_parameters, view.layers.keys(), still_parameters
    )


def _original_layers(view: View, networks: StillNetworks) -> dict[str, LoRALayer]:
    """The layer that each layer of a copy follows, where both are adapted: ``{"momentum.0": the layer encoder.0}``."""
    originals = networks.originals_of(view.layers)
    adapted = with_values(originals, view.layers)
    return {name: view.layers[original] for name, original in adapted.items()}

"""Adapters that were taken off their layers: merged, removed, or inactive now.

An optimizer may still hold them.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from weakref import ReferenceType, ref

from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_lora.layers import LayerAdapter, LoRALayer
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.names import join


@dataclass(frozen=True)
class FormerPlace:
    """The layer that an adapter was on."""

    layer: ReferenceType[nn.Module]

    name: str
    """The layer's name in its model."""

    weight_names: tuple[str, ...]
    """The names of the weights that the adapter had updates for, in the layer."""

    def weights_that_train(self) -> dict[str, nn.Parameter]:
        """Return those weights of the layer that train now, by their names in the model.

        There are none if the layer has an adapter again.
        """
        layer = self.layer()
        if layer is None or isinstance(layer, LoRALayer):
            return {}
        weights = only(dict(layer.named_parameters()), self.weight_names)
        return {
            join(self.name, name): weight
            for name, weight in weights.items()
            if weight.requires_grad
        }


_PLACES = WeakTensorKeyDictionary()
"""The former place of each parameter of an adapter that was taken off."""


def note_former_place(layer: nn.Module, name: str, adapter: LayerAdapter) -> None:
    """Note the layer that an adapter was taken off, and the layer's name in its model."""
    place = FormerPlace(ref(layer), name, tuple(adapter.weights))
    for parameter in adapter.parameters.values():
        _PLACES[parameter] = place


def former_places(parameters: Iterable[nn.Parameter]) -> list[FormerPlace]:
    """Return where adapters with some of these parameters were, each place once.

    Parameters of other adapters, and of no adapter, say nothing.
    """
    places = dict[FormerPlace, None]()
    for parameter in parameters:
        place = _PLACES.get(parameter)
        if place is not None:
            places[place] = None
    return list(places)

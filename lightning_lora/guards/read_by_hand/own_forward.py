"""The forward of a layer, which reads its own weights: what it reads counts for nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.guards.read_by_hand.watched_weight import WatchedWeight
from lightning_lora.layers import LoRALayer
from lightning_lora.tensors.names import find_parameter, owner_of, submodule


class OwnForward:
    """Stands in for the forward of a layer, which then sees its watched weights as plain tensors."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.was_called = False
        self._id_of_original = id(layer)
        # a forward that other code had set on the layer
        self._replaced: Callable[..., Any] | None = None
        self._weights = _places_of_weights(layer)
        self._shown_plain: list[_Place] = []  # while the layer runs

    def put_on(self) -> None:
        """Put it in the place of the layer's own, or of other code's."""
        attributes = vars(self.layer)
        self._replaced = attributes.get("forward")
        attributes["forward"] = self

    def take_off(self) -> None:
        """Put back what was there."""
        self._hide_plain_weights()
        attributes = vars(self.layer)
        if attributes.get("forward") is not self:
            return
        del attributes["forward"]
        if self._replaced is not None:
            attributes["forward"] = self._replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102  # the layer's own forward
        if self._is_of_a_copy():
            self.take_off()
        self.was_called = True
        if self._shown_plain:  # the layer calls itself
            return self._run(*args, **kwargs)
        self._show_plain_weights()
        try:
            return self._run(*args, **kwargs)
        finally:
            self._hide_plain_weights()

    def _is_of_a_copy(self) -> bool:
        """Whether deepcopy has copied this object with its layer: nobody takes it off there."""
        return id(self.layer) != self._id_of_original

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of other code, or that of the layer's class."""
        if self._replaced is not None:
            return self._replaced(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def _show_plain_weights(self) -> None:
        """Set plain tensors as attributes, which come before parameters."""
        for place in self._weights:
            weight = find_parameter(place.owner, place.name)
            attributes = vars(place.owner)
            if isinstance(weight, WatchedWeight) and place.name not in attributes:
                attributes[place.name] = weight.detach()
                self._shown_plain.append(place)

    def _hide_plain_weights(self) -> None:
        """Remove these attributes."""
        while self._shown_plain:
            place = self._shown_plain.pop()
            vars(place.owner).pop(place.name, None)


class _Place(NamedTuple):
    """Where a weight is: a module, and the weight's name there."""

    owner: nn.Module
    name: str


def _places_of_weights(layer: nn.Module) -> list[_Place]:
    """Where a layer's weights are: in it, or in layers inside it."""
    names = (
        layer.lora_weights()
        if isinstance(layer, LoRALayer)
        else tuple(layer._parameters)
    )
    places = []
    for name in names:
        owner = submodule(layer, owner_of(name))
        places.append(_Place(owner, name.rpartition(".")[2]))
    return places

"""The forward of a layer, which reads its own weights: what it reads counts for nothing."""

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_lora.guards.read_by_hand.watched_weight import WatchedWeight
from lightning_lora.layers import LoRALayer
from lightning_lora.tensors.named import only
from lightning_lora.tensors.names import find_parameter, owner_of, submodule


class OwnForward:
    """The forward of a layer, which sees its watched weights as plain tensors."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.id_of_layer = id(layer)
        self.before: dict[str, Callable[..., Any]] = {}  # what other code had set on the layer
        self.was_called = False
        self._places = _places_of_weights(layer)
        self._shown: list[tuple[nn.Module, str]] = []

    def put_on(self) -> None:
        """Put it in the place of the layer's own, or of other code's."""
        attributes = vars(self.layer)
        self.before = only(attributes, ["forward"])
        attributes["forward"] = self

    def take_off(self) -> None:
        """Put back what was there."""
        self._hide()
        attributes = vars(self.layer)
        if attributes.get("forward") is self:
            del attributes["forward"]
            attributes.update(self.before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: D102  # the layer's own forward
        if id(self.layer) != self.id_of_layer:  # deepcopy has copied this object with its layer, which shall be plain
            self.take_off()
        self.was_called = True
        if self._shown:  # the layer calls itself
            return self._run(*args, **kwargs)
        self._show_plain_weights()
        try:
            return self._run(*args, **kwargs)
        finally:
            self._hide()

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of other code, or that of the layer's class."""
        if self.before:
            return self.before["forward"](*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)

    def _show_plain_weights(self) -> None:
        """Set them as attributes, which come before parameters."""
        for owner, name in self._places:
            weight = find_parameter(owner, name)
            if type(weight) is WatchedWeight and name not in vars(owner):
                vars(owner)[name] = weight.detach()
                self._shown.append((owner, name))

    def _hide(self) -> None:
        """Remove these attributes."""
        while self._shown:
            owner, name = self._shown.pop()
            vars(owner).pop(name, None)


def _places_of_weights(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """The modules that hold a layer's weights, with their names there."""
    names = layer.lora_weights() if isinstance(layer, LoRALayer) else tuple(layer._parameters)
    places = []
    for name in names:
        owner = submodule(layer, owner_of(name))
        places.append((owner, name.rpartition(".")[2]))
    return places

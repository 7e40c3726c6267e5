"""Watches the frozen weights of adapted layers for one batch."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lightning_lora import private
from lightning_lora.guards.read_by_hand.own_forward import OwnForward
from lightning_lora.guards.read_by_hand.watched_weight import (
    WatchedWeight,
    unwatch,
    watch,
)
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import only, where, where_not, with_values, without
from lightning_lora.tensors.names import names_joined, owner_of


class WeightWatch:
    """Watches weights while a part of a batch runs.

    Each weight is of a class that sees what torch computes with it. Its own layer gets
    a plain tensor with the same values instead, so what the class sees is other code.
    """

    def __init__(
        self, view: View, layers: Mapping[str, LoRALayer], kind: type[WatchedWeight]
    ) -> None:
        """Choose what is watched: the weights of these layers, each of which becomes of this kind."""
        self._layers = dict(layers)
        self._kind = kind
        self._is_running = False
        # the layers whose weights other code has read
        self._read: set[LoRALayer] = set()
        self._weights = _plain_frozen_weights(view, layers)
        self._forwards = list(map(OwnForward, _readers(view, self._weights)))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the weights meanwhile."""
        # a backward pass may run inside of a training step, which is watched already
        if self._is_running or not self._weights:
            yield
            return
        try:
            self._begin()
            with private.before_compiling(self._give_up):
                yield
        finally:
            self._stop()

    def layers_read(self) -> list[str]:
        """Return the names of the layers whose weights other code has read meanwhile."""
        return list(with_values(self._layers, self._read))

    def layers_without_call(self) -> list[str]:
        """Return the names of the layers that nothing has called meanwhile."""
        called = {forward.layer for forward in self._forwards if forward.was_called}
        return list(where_not(self._layers, called.__contains__))

    def _begin(self) -> None:
        """Watch the weights. Their layers see plain tensors."""
        self._is_running = True
        for weight, layer in self._weights.items():
            watch(weight, self._kind, layer, self._read)
        for forward in self._forwards:
            forward.put_on()

    def _stop(self) -> None:
        """Make weights and layers plain again."""
        self._is_running = False
        for weight in self._weights:
            unwatch(weight)
        for forward in self._forwards:
            forward.take_off()

    def _give_up(self) -> None:
        """Watch nothing more: something is compiled, which must not see what is there for one batch."""
        self._stop()
        self._weights = {}


def layers_with_gradients(view: View) -> dict[str, LoRALayer]:
    """Return the layers whose adapters get gradients: they train, and no code has frozen them since."""
    return where(view.layers, _gets_gradients)


def _gets_gradients(layer: LoRALayer) -> bool:
    return any(p.requires_grad for p in layer.lora_trainable())


def _plain_frozen_weights(
    view: View, layers: Mapping[str, LoRALayer]
) -> dict[nn.Parameter, LoRALayer]:
    """The weights of layers that can be watched: none is sharded, quantised, computed, or frozen by the user."""
    candidates = where(
        without(view.base_parameters, view.frozen_by_user), _can_be_watched
    )
    layer_of_weight = {}
    for name, layer in layers.items():
        # what is computed now, by a parametrization, is no parameter
        weights = only(candidates, names_joined(name, layer.lora_weights()))
        for weight in weights.values():
            layer_of_weight[weight] = layer
    return layer_of_weight


def _can_be_watched(weight: nn.Parameter) -> bool:
    """Whether a weight is plain, frozen, and has values with gradients."""
    has_values = type(weight) is nn.Parameter and not (
        weight.is_meta or weight.is_inference()
    )
    return has_values and weight.is_floating_point() and not weight.requires_grad


def _readers(view: View, watched: Collection[nn.Parameter]) -> list[nn.Module]:
    """The modules that may read watched weights: adapted layers, and layers that are tied to them."""
    if not watched:
        return []
    owners = set(map(owner_of, with_values(view.parameters, watched)))
    leaves = where(only(view.modules, owners), _is_leaf)
    # each once
    readers: dict[nn.Module, None] = dict.fromkeys(
        (*view.layers.values(), *leaves.values())
    )
    return list(readers)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module holds no others, and is not scripted."""
    return not module._modules and not isinstance(module, torch.jit.ScriptModule)

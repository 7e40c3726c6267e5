"""Adapted weights that the first training step reads outside of their layers: without their updates, so by mistake.

In the first batch, each frozen weight of an adapted layer is of a class that sees what
torch computes with it. Its own layer gets a plain tensor with the same values instead.
So what the class sees is other code: a penalty, a decay by name, a forward hook, a
product by hand. It gives that code a tensor with a graph. A backward pass that comes
there shows that the loss depends on what was read. No value changes by that, and after
the batch, nothing is left of it.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_lora import private
from lightning_lora.errors import listed, warn
from lightning_lora.guards.read_by_hand.compiled_code import is_compiled
from lightning_lora.guards.read_by_hand.own_forward import OwnForward
from lightning_lora.guards.read_by_hand.watched_weight import unwatch, watch
from lightning_lora.guards.wording import MOST_NAMES, as_entries
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.moments import Guard
from lightning_lora.tensors.dicts import only, where, with_values, without
from lightning_lora.tensors.names import names_joined, owner_of
from lightning_lora.training.steps.moved_copies import FrozenCopies


class ReadByHand(Guard):
    """Names layers whose weights other code reads in the first batch."""

    def __init__(self) -> None:
        # all adapted layers
        self.layers: dict[str, LoRALayer] = {}
        # each weight that is watched, with the name of its layer
        self.watched: dict[nn.Parameter, str] = {}
        # the forwards of layers that may read these weights
        self.forwards: list[OwnForward] = []
        # the names of layers whose weights other code has read
        self.read: dict[str, None] = {}
        # whether a part of the first batch runs
        self.is_watching = False

    def first_step_begins(self, view: View, copies: FrozenCopies) -> None:
        """Choose what is watched."""
        if not is_compiled(view.model):
            self.layers = view.layers
            self.watched = watched_weights(view)
            self.forwards = list(map(OwnForward, _readers(view, self.watched)))

    @contextmanager
    def first_batch_runs(self, model: nn.Module) -> Iterator[None]:
        """Watch the weights meanwhile."""
        # a backward pass may run inside of a training step, which is watched already
        if self.is_watching or not self.watched:
            yield
            return
        try:
            self._begin_to_watch()
            with private.before_compiling(self._give_up):
                yield
        finally:
            self._stop_watching()

    def first_batch_ended(self, model: nn.Module) -> None:
        """Name what was read, but no layer that nothing calls: its adapter is dead, and another guard says so."""
        called = {forward.layer for forward in self.forwards if forward.was_called}
        layers_read = only(self.layers, self.read)
        names = list(with_values(layers_read, called))
        self.watched, self.layers, self.forwards = {}, {}, []  # lets go of the weights
        if names:
            warn(_about_reads(type(model).__name__, names))

    def _begin_to_watch(self) -> None:
        """Watch the weights. Their layers see plain tensors."""
        self.is_watching = True
        for weight, layer in self.watched.items():
            watch(weight, layer, self.read)
        for forward in self.forwards:
            forward.put_on()

    def _stop_watching(self) -> None:
        """Make weights and layers plain again."""
        self.is_watching = False
        for weight in self.watched:
            unwatch(weight)
        for forward in self.forwards:
            forward.take_off()

    def _give_up(self) -> None:
        """Watch nothing more: something is compiled, which must not see what is there for one batch."""
        self._stop_watching()
        self.watched = {}


def _about_reads(title: str, names: list[str]) -> str:
    entries = as_entries(names)
    return (
        f"A training step reads the weight of {listed(names, MOST_NAMES)} of {title} "
        "itself, without its update: a penalty, a hook, a product by hand. It sees the "
        "frozen weight, and a merge would change what it computes. Train these layers "
        f"in full: modules_to_save={entries}. Or leave them out: "
        f"exclude_modules={entries}. An output head that shares a weight can be a tied "
        "layer instead: nn.Linear without bias."
    )


# What is watched


def watched_weights(view: View) -> dict[nn.Parameter, str]:
    """Return the plain frozen weights of layers whose adapters train, with these layers' names.

    None is sharded or quantised.
    """
    candidates = where(
        without(view.base_parameters, view.frozen_by_user), _can_be_watched
    )
    layer_of_weight = {}
    for name, layer in where(view.layers, _trains).items():
        # what is computed now, by a parametrization, is no parameter
        weights = only(candidates, names_joined(name, layer.lora_weights()))
        for weight in weights.values():
            layer_of_weight[weight] = name
    return layer_of_weight


def _trains(layer: LoRALayer) -> bool:
    """Whether an adapter trains."""
    return any(p.requires_grad for p in layer.lora_trainable())


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

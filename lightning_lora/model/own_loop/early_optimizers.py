"""Refuse an optimizer that trains nothing, in a loop of one's own.

At its next step, one of three errors says what it holds in place of what trains:

1. It was made before the adapters, and holds the weights that they have frozen::

       optimizer = Adam(model.parameters())
       inject_adapters(model, config)
       optimizer.step()

2. It holds an adapter that is inactive now::

       inject_adapters(model, config, name="de")
       optimizer = Adam(p for p in model.parameters() if p.requires_grad)
       inject_adapters(model, config, name="fr")
       model(x).sum().backward()
       optimizer.step()

3. It holds adapters that were merged or removed, and the weights train again::

       inject_adapters(model, config)
       optimizer = Adam(p for p in model.parameters() if p.requires_grad)
       merge_adapters(model)
       optimizer.step()

There is no error if another optimizer holds what trains, unless the first mistake is of
an optimizer that holds frozen weights alone: it can only be meant for adapters.
"""

import gc
from collections.abc import Collection, Iterable, Iterator
from weakref import WeakSet

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.errors import OptimizerError, listed
from lightning_lora.layers import LayerAdapter, LoRALayer
from lightning_lora.model.own_loop.detached_adapters import (
    former_places,
    note_former_place,
)
from lightning_lora.model.own_loop.float16_steps import check_dtypes
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import only, where, with_values
from lightning_lora.tensors.names import names_joined

_ADAPTED_MODELS: "WeakSet[nn.Module]" = WeakSet()

_CHECKED_OPTIMIZERS: "WeakSet[Optimizer]" = WeakSet()
"""The optimizers that have taken a step since adapters were last attached or taken off."""

_HOOKS: list[RemovableHandle] = []
"""The hook on the steps of all optimizers.

It comes with the first adapters: an import changes nothing of the process.
"""


def watch_optimizers(model: nn.Module) -> None:
    """Check each optimizer at its next step: it may hold none of the adapters that this model has got."""
    _ADAPTED_MODELS.add(model)
    _CHECKED_OPTIMIZERS.clear()
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_check_optimizer))


def note_detached_adapter(view: View, layer: str, adapter: LayerAdapter) -> None:
    """Check each optimizer at its next step: it may hold this adapter, which was taken off its layer."""
    note_former_place(view.modules[layer], layer, adapter)
    _CHECKED_OPTIMIZERS.clear()


def _check_optimizer(optimizer: Optimizer, *_: object) -> None:
    """Refuse an optimizer that takes a step and trains nothing, or whose step ends in NaN."""
    if optimizer in _CHECKED_OPTIMIZERS:
        return
    held = _Held(optimizer)
    _refuse_detached_adapters(held)
    # in several processes, each optimizer may hold only a share of what trains
    may_hold_a_share = dist.is_available() and dist.is_initialized()
    for model in list(_ADAPTED_MODELS):
        view = View(model)
        check_dtypes(view, optimizer, held.parameters)
        if not may_hold_a_share:
            _refuse_frozen_weights(view, held)
            _refuse_inactive_adapters(view, held)
    _CHECKED_OPTIMIZERS.add(optimizer)


class _Held:
    """What an optimizer holds when it takes a step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.optimizer_name = type(optimizer).__name__
        self.parameters = _held_by(optimizer)
        self.with_gradients = _with_gradients(self.parameters)
        self.frozen_without_gradient = {
            p for p in self.parameters - self.with_gradients if not p.requires_grad
        }

    def are_held_elsewhere(self, parameters: set[nn.Parameter]) -> bool:
        """Whether another optimizer holds some of these parameters, even if it has taken no step yet."""
        for each in gc.get_objects():
            # isinstance would run code of the objects
            is_another = (
                issubclass(type(each), Optimizer) and each is not self.optimizer
            )
            if is_another and not parameters.isdisjoint(_held_by(each)):
                return True
        return False


def _held_by(optimizer: Optimizer) -> set[nn.Parameter]:
    held = set[nn.Parameter]()
    # an optimizer has no groups until it is built
    for group in getattr(optimizer, "param_groups", ()):
        held.update(group["params"])
    return held


def _with_gradients(parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    return {p for p in parameters if p.grad is not None}


# 1. Weights that adapters have frozen


def _refuse_frozen_weights(view: View, held: _Held) -> None:
    """Refuse an optimizer that holds frozen weights of adapted layers, and none of their adapters."""
    layers_by_weight = _layers_of_frozen_weights(view, held.frozen_without_gradient)
    adapters = _adapters_on(view, set(layers_by_weight.values()))
    if not adapters or not held.parameters.isdisjoint(adapters):
        return
    # of two optimizers, one may train other parameters, and the other one the adapters;
    # one that holds frozen weights alone was made too early
    holds_others = held.frozen_without_gradient != held.parameters
    if holds_others and held.are_held_elsewhere(adapters):
        return
    raise OptimizerError(
        f"{held.optimizer_name} holds {listed(layers_by_weight)} of {view.title}, "
        "which are frozen, and no adapter. Make it after inject_adapters or "
        "load_adapter, of (p for p in model.parameters() if p.requires_grad)."
    )


def _layers_of_frozen_weights(view: View, frozen: set[nn.Parameter]) -> dict[str, str]:
    """Those of these weights that have an adapter which trains, each with its layer: ``{"head.weight": "head"}``."""
    layers_by_weight = dict[str, str]()
    frozen_weights = with_values(view.base_parameters, frozen)
    for name, layer in where(view.layers, LoRALayer.lora_trains).items():
        frozen_of_layer = only(frozen_weights, names_joined(name, layer.lora_weights()))
        layers_by_weight.update(dict.fromkeys(frozen_of_layer, name))
    return layers_by_weight


def _adapters_on(view: View, layers: Collection[str]) -> set[nn.Parameter]:
    """The parameters of all adapters of these layers.

    Inactive ones count too: their optimizer may still take a step with gradients from
    before.
    """
    found = set[nn.Parameter]()
    for layer in only(view.layers, layers).values():
        found.update(layer.lora_parameters().values())
    for state in _inactive_adapters(view):
        found.update(_parameters_of(only(state.kept.layer_adapters, layers).values()))
    return found


# 2. Adapters that are inactive now


def _refuse_inactive_adapters(view: View, held: _Held) -> None:
    """Refuse an optimizer that holds inactive adapters alone, if others got gradients and no optimizer holds them."""
    # with gradients from before the switch, it may still take its step
    if held.with_gradients or not held.parameters:
        return
    if not held.parameters <= _inactive_parameters(view):
        return
    active = _with_gradients(view.model.parameters())
    if not active or held.are_held_elsewhere(active):
        return
    raise OptimizerError(
        f"{held.optimizer_name} holds adapters of {view.title} that rest, and no "
        f"optimizer holds {view.adapter.name!r}, which has gradients. Make it anew "
        "after set_adapter or inject_adapters, of (p for p in model.parameters() if "
        "p.requires_grad)."
    )


def _inactive_parameters(view: View) -> set[Tensor]:
    """All parameters of the inactive adapters, and what trains in full with them."""
    found = set[Tensor]()
    for state in _inactive_adapters(view):
        found.update(state.kept.tensors.values())
        found.update(_parameters_of(state.kept.layer_adapters.values()))
    return found


def _inactive_adapters(view: View) -> list[AdapterState]:
    """What the model remembers of the adapters that are not active."""
    return list(view.record.inactive_adapters.values()) if view.is_adapted else []


def _parameters_of(adapters: Iterable[LayerAdapter]) -> Iterator[nn.Parameter]:
    for adapter in adapters:
        yield from adapter.parameters.values()


# 3. Adapters that were merged or removed


def _refuse_detached_adapters(held: _Held) -> None:
    """Refuse an optimizer that holds adapters which were merged or removed, if no optimizer holds their weights."""
    weights = dict[str, nn.Parameter]()
    for place in former_places(held.parameters):
        weights.update(place.weights_that_train())
    not_held_here = set(weights.values()) - held.parameters
    if not not_held_here or held.are_held_elsewhere(not_held_here):
        return
    names = list(with_values(weights, not_held_here))
    raise OptimizerError(
        f"{held.optimizer_name} holds adapters that were merged or removed, and not "
        f"the weights that train in their place: {listed(names)}. Make the optimizer "
        "anew, of model.parameters(). In a LightningModule, make it in "
        "configure_optimizers, not in __init__."
    )

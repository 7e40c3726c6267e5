"""Optimizers in a loop of one's own that train nothing.

They were made before the adapters, or of other adapters that are inactive now, or of
adapters that were merged or removed since.
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
from lightning_lora.model.own_loop.detached_adapters import former_places, note_detached
from lightning_lora.model.own_loop.float16_steps import check_dtypes
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import only, where, with_values
from lightning_lora.tensors.names import names_joined

_ADAPTED: "WeakSet[nn.Module]" = WeakSet()
# those that have taken a step since adapters were attached
_CHECKED: "WeakSet[Optimizer]" = WeakSet()
# one, from the first adapters on: an import changes nothing of the process
_HOOKS: list[RemovableHandle] = []


def watch_optimizers(model: nn.Module) -> None:
    """Check each optimizer at its next step."""
    _ADAPTED.add(model)
    _CHECKED.clear()
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_check_optimizer))


def note_detached_adapter(view: View, layer: str, adapter: LayerAdapter) -> None:
    """Check each optimizer at its next step: it may hold this adapter, which was taken off its layer."""
    note_detached(view.modules[layer], layer, adapter)
    _CHECKED.clear()


def _check_optimizer(optimizer: Optimizer, *_: object) -> None:
    """Refuse an optimizer of frozen weights, or of adapters that take no part, if it holds none of what trains."""
    if optimizer in _CHECKED:
        return
    held = _Held(optimizer)
    _refuse_detached_adapters(held)
    # in several processes, each optimizer may hold only a share of what trains
    may_hold_a_share = dist.is_available() and dist.is_initialized()
    for model in list(_ADAPTED):
        view = View(model)
        check_dtypes(view, optimizer, held.parameters)
        if not may_hold_a_share:
            _refuse_frozen_weights(view, held)
            _refuse_inactive_adapters(view, held)
    _CHECKED.add(optimizer)


class _Held:
    """What an optimizer holds when it takes a step."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = _held_by(optimizer)
        self.with_gradients = _with_gradients(self.parameters)
        self.frozen = {
            p for p in self.parameters - self.with_gradients if not p.requires_grad
        }


def _refuse_frozen_weights(view: View, held: _Held) -> None:
    """Refuse an optimizer that holds frozen weights of adapted layers, and none of their adapters."""
    layers_by_weight = _layers_of_frozen_weights(view, held.frozen)
    adapters = _adapters_on(view, set(layers_by_weight.values()))
    if not adapters or not held.parameters.isdisjoint(adapters):
        return
    trains_others = held.frozen != held.parameters
    # another optimizer holds the adapters, and this one is for other parameters
    if trains_others and _are_held_by_another(adapters, held.optimizer):
        return
    raise OptimizerError(
        f"{type(held.optimizer).__name__} holds {listed(layers_by_weight)} of "
        f"{view.title}, which are frozen, and no adapter. Make it after "
        "inject_adapters or load_adapter, of (p for p in model.parameters() if "
        "p.requires_grad)."
    )


def _refuse_inactive_adapters(view: View, held: _Held) -> None:
    """Refuse an optimizer that holds inactive adapters alone, after a backward pass through others in no optimizer."""
    if held.with_gradients:
        return
    holds_inactive_alone = held.parameters and held.parameters <= _inactive_parameters(
        view
    )
    active = _with_gradients(view.model.parameters())
    if (
        holds_inactive_alone
        and active
        and not _are_held_by_another(active, held.optimizer)
    ):
        raise OptimizerError(
            f"{type(held.optimizer).__name__} holds adapters of {view.title} that "
            f"rest, and no optimizer holds {view.adapter.name!r}, which has gradients. "
            "Make it anew after set_adapter or inject_adapters, of (p for p in "
            "model.parameters() if p.requires_grad)."
        )


def _refuse_detached_adapters(held: _Held) -> None:
    """Refuse an optimizer that holds adapters which were merged or removed, if their weights train in none."""
    weights = dict[str, nn.Parameter]()
    for place in former_places(held.parameters):
        weights.update(place.weights_that_train())
    in_no_group = set(weights.values()) - held.parameters
    if not in_no_group or _are_held_by_another(in_no_group, held.optimizer):
        return
    names = list(with_values(weights, in_no_group))
    raise OptimizerError(
        f"{type(held.optimizer).__name__} holds adapters that were merged or removed, "
        f"and not the weights that train in their place: {listed(names)}. Make the "
        "optimizer anew, of model.parameters(). In a LightningModule, make it in "
        "configure_optimizers, not in __init__."
    )


# What is in the model, and in no optimizer


def _with_gradients(parameters: Iterable[nn.Parameter]) -> set[nn.Parameter]:
    return {p for p in parameters if p.grad is not None}


def _inactive_adapters(view: View) -> list[AdapterState]:
    """What the model remembers of the adapters that are not active."""
    return list(view.record.inactive_adapters.values()) if view.is_adapted else []


def _inactive_parameters(view: View) -> set[Tensor]:
    """All parameters of the inactive adapters, and what trains in full with them."""
    found = set[Tensor]()
    for state in _inactive_adapters(view):
        found.update(state.inactive_tensors.values())
        found.update(_parameters_of(state.inactive_layer_adapters.values()))
    return found


def _layers_of_frozen_weights(view: View, frozen: set[nn.Parameter]) -> dict[str, str]:
    """The names of those of these weights that have an adapter which trains, and their layers."""
    layers_by_weight = dict[str, str]()
    frozen_weights = with_values(view.base_parameters, frozen)
    # lora_trainable gives an empty list, which is false, if nothing of it trains
    for name, layer in where(view.layers, LoRALayer.lora_trainable).items():
        frozen_of_layer = only(frozen_weights, names_joined(name, layer.lora_weights()))
        layers_by_weight.update(dict.fromkeys(frozen_of_layer, name))
    return layers_by_weight


def _adapters_on(view: View, layers: Collection[str]) -> set[nn.Parameter]:
    """The parameters of all adapters of these layers, also of inactive ones: they may take a step of their own."""
    found = set[nn.Parameter]()
    for layer in only(view.layers, layers).values():
        found.update(layer.lora_parameters().values())
    for state in _inactive_adapters(view):
        found.update(
            _parameters_of(only(state.inactive_layer_adapters, layers).values())
        )
    return found


def _parameters_of(adapters: Iterable[LayerAdapter]) -> Iterator[nn.Parameter]:
    for adapter in adapters:
        yield from adapter.parameters.values()


# What is in optimizers


def _are_held_by_another(adapters: set[nn.Parameter], optimizer: Optimizer) -> bool:
    """Whether any other optimizer holds some of these, also one that has taken no step yet."""
    for each in gc.get_objects():
        # isinstance runs code of theirs
        is_another = issubclass(type(each), Optimizer) and each is not optimizer
        if is_another and not adapters.isdisjoint(_held_by(each)):
            return True
    return False


def _held_by(optimizer: Optimizer) -> set[nn.Parameter]:
    held = set[nn.Parameter]()
    # which it lacks until it is built
    for group in getattr(optimizer, "param_groups", ()):
        held.update(group["params"])
    return held

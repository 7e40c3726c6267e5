"""Optimizers that were made before the adapters, in a loop of one's own: they would train none of them."""

import gc
from collections.abc import Collection, Iterator
from weakref import WeakSet

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_lora.errors import OptimizerError, listed
from lightning_lora.model.view import View
from lightning_lora.tensors.names import join

_ADAPTED: "WeakSet[nn.Module]" = WeakSet()
_CHECKED: "WeakSet[Optimizer]" = WeakSet()  # those that have taken a step since adapters were attached
_HOOKS: list[RemovableHandle] = []  # one, from the first adapters on: an import changes nothing of the process


def watch_optimizers(model: nn.Module) -> None:
    """Check each optimizer at its next step."""
    _ADAPTED.add(model)
    _CHECKED.clear()
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_check_optimizer))


def _check_optimizer(optimizer: Optimizer, *_: object) -> None:
    """Refuse an optimizer of frozen weights below adapters, if it holds none of these adapters."""
    if optimizer in _CHECKED or (dist.is_available() and dist.is_initialized()):  # there, each may hold only its share
        return
    held = _held_by(optimizer)
    frozen = {p for p in held if p.grad is None and not p.requires_grad}
    for model in list(_ADAPTED) if frozen else ():
        _check_for(View(model), optimizer, held, frozen)
    _CHECKED.add(optimizer)


def _check_for(view: View, optimizer: Optimizer, held: set[nn.Parameter], frozen: set[nn.Parameter]) -> None:
    """Check an optimizer for one model."""
    below = _weights_below_adapters(view, frozen)
    adapters = _adapters_of(view, below.values())
    if not adapters or not held.isdisjoint(adapters):
        return
    trains_others = frozen != held
    if trains_others and _are_held_by_another(adapters, optimizer):  # this one is for the others
        return
    raise OptimizerError(
        f"{type(optimizer).__name__} holds {listed(below)} of {view.title}, which are frozen, and no adapter. "
        "Make it after inject_adapters or load_adapter, of (p for p in model.parameters() if p.requires_grad)."
    )


def _weights_below_adapters(view: View, frozen: set[nn.Parameter]) -> dict[str, str]:
    """The names of those of these weights that have an adapter which trains, and their layers."""
    below = dict[str, str]()
    for name, layer in view.layers.items():
        if not layer.lora_trained():
            continue
        for weight in layer.lora_weights():
            whole = join(name, weight)
            if view.base.get(whole) in frozen:
                below[whole] = name
    return below


def _adapters_of(view: View, layers: Collection[str]) -> set[nn.Parameter]:
    """The parameters of all adapters of these layers, also of those that rest: they may take a step of their own."""
    found = set[nn.Parameter]()
    for name in layers:
        found.update(view.layers[name].lora_parameters().values())
        for state in view.record.others.values() if view.is_adapted else ():
            if name in state.resting:
                found.update(state.resting[name].parameters.values())
    return found


def _are_held_by_another(adapters: set[nn.Parameter], optimizer: Optimizer) -> bool:
    """Whether any other optimizer holds some of these, also one that has taken no step yet."""
    return any(not adapters.isdisjoint(_held_by(each)) for each in _all_optimizers() if each is not optimizer)


def _all_optimizers() -> Iterator[Optimizer]:
    for each in gc.get_objects():
        if issubclass(type(each), Optimizer):
            yield each


def _held_by(optimizer: Optimizer) -> set[nn.Parameter]:
    groups = getattr(optimizer, "param_groups", ())  # which it lacks until it is built
    return {p for group in groups for p in group["params"]}

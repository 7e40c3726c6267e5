"""Optimizers in a loop of one's own that train nothing, or NaN.

They were made before the adapters, or of other adapters that rest now, or of float16 weights.
"""

import gc
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.errors import OptimizerError, listed
from lightning_lora.layers import Adapter, LoRALayer
from lightning_lora.model.view import View
from lightning_lora.tensors.named import joined, only, where, with_values

_ADAPTED: "WeakSet[nn.Module]" = WeakSet()
_CHECKED: "WeakSet[Optimizer]" = WeakSet()  # those that have taken a step since adapters were attached
_IN_FLOAT32: "WeakSet[nn.Module]" = WeakSet()  # models whose Trainer lets float16 weights take their steps in float32
_HOOKS: list[RemovableHandle] = []  # one, from the first adapters on: an import changes nothing of the process


def watch_optimizers(model: nn.Module) -> None:
    """Check each optimizer at its next step."""
    _ADAPTED.add(model)
    _CHECKED.clear()
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_check_optimizer))


def _check_optimizer(optimizer: Optimizer, *_: object) -> None:
    """Refuse an optimizer of frozen weights below adapters, or of resting ones, if it holds none that act."""
    if optimizer in _CHECKED:
        return
    held = _held_by(optimizer)
    has_gradients = any(p.grad is not None for p in held)
    frozen = {p for p in held if p.grad is None and not p.requires_grad}
    for model in list(_ADAPTED):
        view = View(model)
        _check_dtypes(view, optimizer, held)
        if dist.is_available() and dist.is_initialized():  # there, each process may hold only its share
            continue
        if frozen:
            _check_frozen(view, optimizer, held, frozen)
        if not has_gradients:
            _check_active(view, optimizer, held)
    _CHECKED.add(optimizer)


@contextmanager
def steps_are_in_float32(model: nn.Module) -> Iterator[None]:
    """Let float16 weights of ``model`` train: inside the ``with`` block, an optimizer sees them in float32."""
    _IN_FLOAT32.add(model)
    try:
        yield
    finally:
        _IN_FLOAT32.discard(model)


def _gives_nan_in_float16(optimizer: Optimizer) -> bool:
    """Whether it divides by roots of its state plus an epsilon, which is zero in float16, as that of Adam is."""
    epsilons = [group.get("eps") for group in optimizer.param_groups]
    return any(isinstance(each, float) and torch.tensor(each, dtype=torch.float16) == 0 for each in epsilons)


def _check_dtypes(view: View, optimizer: Optimizer, held: set[nn.Parameter]) -> None:
    """Refuse float16 weights that train in full, if adapters are kept in float32."""
    if not view.is_adapted or view.is_merged or not view.config.autocast_adapter_dtype:
        return
    halves = [name for name, p in view.trained.items() if p in held and p.dtype == torch.float16 and p.requires_grad]
    if halves and _gives_nan_in_float16(optimizer) and not _steps_in_float32(view.model):
        raise OptimizerError(
            f"{listed(halves)} of {view.title} train in full in float16, in which {type(optimizer).__name__} ends in "
            "NaN. Keep the weights in float32 (with autocast) or bfloat16, or use a Trainer with LoRACallback, which "
            "takes these steps in float32."
        )


def _steps_in_float32(model: nn.Module) -> bool:
    """Whether a model is one, or lies in one, whose optimizers see float16 weights in float32."""
    return any(model in set(outer.modules()) for outer in _IN_FLOAT32)


def _check_frozen(view: View, optimizer: Optimizer, held: set[nn.Parameter], frozen: set[nn.Parameter]) -> None:
    """Refuse an optimizer that holds frozen weights below adapters, and none of these."""
    below = _weights_below_adapters(view, frozen)
    adapters = _adapters_of(view, set(below.values()))
    if not adapters or not held.isdisjoint(adapters):
        return
    trains_others = frozen != held
    if trains_others and _are_held_by_another(adapters, optimizer):  # this one is for the others
        return
    raise OptimizerError(
        f"{type(optimizer).__name__} holds {listed(below)} of {view.title}, which are frozen, and no adapter. "
        "Make it after inject_adapters or load_adapter, of (p for p in model.parameters() if p.requires_grad)."
    )


def _check_active(view: View, optimizer: Optimizer, held: set[nn.Parameter]) -> None:
    """Refuse an optimizer that holds resting adapters alone, after a backward pass through others in no optimizer."""
    holds_resting_alone = held and held <= _resting_parameters(view)
    active = {p for p in view.model.parameters() if p.grad is not None}
    if holds_resting_alone and active and not _are_held_by_another(active, optimizer):
        raise OptimizerError(
            f"{type(optimizer).__name__} holds adapters of {view.title} that rest, and no optimizer holds "
            f"{view.adapter.name!r}, which has gradients. Make it anew after set_adapter or inject_adapters, of (p for "
            "p in model.parameters() if p.requires_grad)."
        )


def _resting_parameters(view: View) -> set[Tensor]:
    """All parameters of the adapters that rest, and what trains in full with them."""
    found = set[Tensor]()
    for state in _resting_adapters(view):
        found.update(state.inactive_tensors.values())
        found.update(_parameters_of(state.inactive_adapters.values()))
    return found


def _resting_adapters(view: View) -> list[AdapterState]:
    """What the model remembers of the adapters that rest."""
    return list(view.record.others.values()) if view.is_adapted else []


def _parameters_of(adapters: Iterable[Adapter]) -> Iterator[nn.Parameter]:
    for adapter in adapters:
        yield from adapter.parameters.values()


def _weights_below_adapters(view: View, frozen: set[nn.Parameter]) -> dict[str, str]:
    """The names of those of these weights that have an adapter which trains, and their layers."""
    below = dict[str, str]()
    frozen_weights = with_values(view.base, frozen)
    for name, layer in where(view.layers, LoRALayer.lora_trained).items():
        weights = [weight for weight in joined(name, layer.lora_weights()) if weight in frozen_weights]
        below |= dict.fromkeys(weights, name)
    return below


def _adapters_of(view: View, layers: Collection[str]) -> set[nn.Parameter]:
    """The parameters of all adapters of these layers, also of those that rest: they may take a step of their own."""
    found = set[nn.Parameter]()
    for layer in only(view.layers, layers).values():
        found.update(layer.lora_parameters().values())
    for state in _resting_adapters(view):
        found.update(_parameters_of(only(state.inactive_adapters, layers).values()))
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

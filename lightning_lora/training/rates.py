"""Learning rates of adapters that are multiples of the module's: their groups follow behind, unseen by schedulers."""

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.errors import ConfigError, OptimizerError
from lightning_lora.layers.matrices import Role
from lightning_lora.model.view import View
from lightning_lora.tensors.inplace import InPlace, overlay
from lightning_lora.tensors.names import own_parameter
from lightning_lora.tensors.shards import to_local

Params = list[nn.Parameter]
Scale = float | dict[str, float]
Scales = dict[nn.Parameter, tuple[str, float]]

_FACTORS = {Role.A: "A", Role.B: "B", Role.MAGNITUDE: "A"}
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_ALIKE = ("momentum", "betas", "weight_decay")


@dataclass
class _Behind:
    place: slice
    follows: list[tuple[int, float]]  # the group that each follows, and its scale
    hooks: list[RemovableHandle]
    hidden: list[dict[str, Any]] = field(default_factory=list)  # the groups, in a scheduler's step
    before: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # adapters and their values, in a step
    is_seen: bool = False  # whether a step has changed one, or kept a state for it
    is_due: bool = False  # whether one has had a gradient, which a step may end without


_BEHIND: "WeakKeyDictionary[Optimizer, _Behind]" = WeakKeyDictionary()
"""What an optimizer has behind the module's groups."""


def scales_of(lr_scale: Scale) -> dict[str, float]:
    """Return the scale of A and that of B."""
    scales: dict[str, Any] = lr_scale if isinstance(lr_scale, dict) else {"A": lr_scale, "B": lr_scale}
    numbers = [isinstance(each, int | float) and each is not True and 0 < each < math.inf for each in scales.values()]
    if scales.keys() - {"A", "B"} or not all(numbers):
        raise ConfigError(
            f"lr_scale={lr_scale!r} is not valid. Expected a number above zero, or two: {{'A': 10, 'B': 160}}."
        )
    return {"A": 1, "B": 1, **scales}


def scales_in(view: View, lr_scale: Scale) -> Scales:
    """Return the scale of each adapter with another rate, and its group's name."""
    scales, found = scales_of(lr_scale), Scales()
    for layer in view.layers.values():
        for name, about in layer.lora_roles().items():
            factor = _FACTORS.get(about.role)
            if factor and scales[factor] != 1:
                title = "lora" if scales["A"] == scales["B"] else f"lora_{factor}"
                found[own_parameter(layer, name)] = title, scales[factor]
    return found


def check_splits(optimizer: Optimizer, groups: list[Params], scales: Scales) -> None:
    """Refuse an optimizer that cannot have several rates."""
    has_one = isinstance(optimizer, LBFGS) or any(group.get("lr") is None for group in optimizer.param_groups)
    if has_one and not scales.keys().isdisjoint(chain.from_iterable(groups)):
        raise OptimizerError(
            f"{type(optimizer).__name__} takes no learning rate for each group of parameters, so lr_scale cannot act. "
            "Leave lr_scale out, or use another optimizer."
        )


def split(optimizer: Optimizer, groups: list[Params], scales: Scales) -> list[Params]:
    """Add a group for each group's adapters of one scale. Return the parameters that each group is to have."""
    kept, moved, follows = list[Params](), list[Params](), list[tuple[int, float]]()
    for number, parameters in enumerate(groups):
        kinds: dict[Any, Params] = {None: []}
        for p in parameters:
            kinds.setdefault(scales.get(p), []).append(p)
        kept.append(kinds.pop(None))
        for (title, scale), adapters in kinds.items():
            group = optimizer.param_groups[number]
            name = f"{group.get('name', f'pg{number + 1}')}-{title}"  # LearningRateMonitor refuses equal names
            optimizer.param_groups.append(deepcopy({**group, "params": [], "name": name}))
            moved.append(adapters)
            follows.append((number, scale))
    if moved:
        hooks = [optimizer.register_load_state_dict_pre_hook(_check_stored)]
        hooks += [optimizer.register_step_pre_hook(_begin_step), optimizer.register_step_post_hook(_end_step)]
        _BEHIND[optimizer] = _Behind(slice(len(kept), len(kept + moved)), follows, hooks)
        follow(optimizer)
    return kept + moved


def unsplit(optimizer: Optimizer) -> None:
    """Undo a split: a module may return the same optimizer in its next fit."""
    if behind := _BEHIND.pop(optimizer, None):
        for group, (number, _) in zip(optimizer.param_groups[behind.place], behind.follows, strict=True):
            optimizer.param_groups[number]["params"].extend(group["params"])
        del optimizer.param_groups[behind.place]
        for hook in behind.hooks:
            hook.remove()


def follow(*optimizers: Any) -> None:
    """Give the groups behind the rates of those that they follow, scaled. A tensor stays the same one."""
    for each in optimizers:
        optimizer = each if each in _BEHIND else getattr(each, "optimizer", each)  # DeepSpeed's has it inside
        if behind := _BEHIND.get(optimizer):
            groups = optimizer.param_groups
            for own, (number, scale) in zip(groups[behind.place], behind.follows, strict=False):  # DeepSpeed steps one
                for key, value in groups[number].items():
                    if key in _SCALED:
                        own[key] = own[key].copy_(value * scale) if isinstance(own.get(key), Tensor) else value * scale
                    elif key in _ALIKE:
                        own[key] = value


def _check_stored(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse the states of A for B: the sizes may be the same."""
    both = state["param_groups"], optimizer.param_groups
    stored, here = ([group.get("name") for group in groups[_BEHIND[optimizer].place]] for groups in both)
    if stored != here:
        raise ValueError(f"its parameter groups of adapters are {stored}, and the module's {here}")


def _unhide(optimizer: Optimizer) -> None:
    """Put back what a scheduler does not see."""
    behind = _BEHIND[optimizer]
    optimizer.param_groups[behind.place.start : behind.place.start], behind.hidden = behind.hidden, []
    follow(optimizer)


def _begin_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Follow what other code wrote, such as a warm-up by hand: one rate in all groups is meant as the module's."""
    _unhide(optimizer)  # a scheduler may call us
    behind = _BEHIND[optimizer]
    if not behind.is_seen and not hasattr(optimizer, "found_inf"):  # by which a GradScaler may skip the step
        for group in optimizer.param_groups[behind.place]:
            if group["lr"] > 0:
                behind.before += [(p, to_local(p).detach().clone()) for p in group["params"]]
    if closure := kwargs.get("closure"):
        return args, {**kwargs, "closure": partial(_with_closure, closure, optimizer)}
    _note_gradients(behind)
    return None


def _with_closure(closure: Callable[[], Any], optimizer: Optimizer) -> Any:
    """Run the closure of a step. Its hooks may write rates too."""
    loss = closure()
    follow(optimizer)
    _note_gradients(_BEHIND[optimizer])
    return loss


def _note_gradients(behind: _Behind) -> None:
    """Note whether an adapter has a gradient to learn from."""
    gradients = [to_local(p.grad) for p, _ in behind.before if p.grad is not None]
    behind.is_due |= any(0 < gradient.norm() < math.inf for gradient in gradients)


def _end_step(optimizer: Optimizer, *_: Any) -> None:
    """Refuse an optimizer that keeps a list of groups of its own: it never trains those behind."""
    behind = _BEHIND[optimizer]
    _note_gradients(behind)
    for p, value in behind.before:
        behind.is_seen |= p in optimizer.state or not torch.equal(to_local(p), value)
    behind.before.clear()
    if behind.is_due and not behind.is_seen:
        raise OptimizerError(
            f"{type(optimizer).__name__} did not train the adapters: it does not look at the parameter groups that "
            "lr_scale adds. Leave lr_scale out, or use another optimizer."
        )


class FollowedScheduler(InPlace):
    """Added to the class of a scheduler, which then sees only the module's groups."""

    overlaid_prefix: ClassVar[str] = "_"  # LightningCLI looks up names of schedulers, but no private ones
    optimizer: Optimizer

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the scheduler's own step, and follow it."""
        behind, groups = _BEHIND.get(self.optimizer), self.optimizer.param_groups
        if not behind or behind.hidden:  # by a scheduler that calls this one
            return super().step(*args, **kwargs)  # type: ignore[misc]
        behind.hidden, groups[behind.place] = groups[behind.place], []
        try:
            return super().step(*args, **kwargs)  # type: ignore[misc]
        finally:
            _unhide(self.optimizer)


def hide_groups(schedulers: Iterable[object], model: nn.Module) -> None:
    """Let schedulers see only the module's groups: those of the Trainer, and those that the module keeps itself."""
    kept: list[Any] = [*schedulers, *vars(model).values()]
    for each in list(kept):
        if isinstance(each, dict | list | tuple):
            kept += each.values() if isinstance(each, dict) else each
    for each in kept:
        is_scheduler = hasattr(each, "step") and not hasattr(each, "zero_grad")  # of any class
        if is_scheduler and getattr(each, "optimizer", None) in _BEHIND and not isinstance(each, FollowedScheduler):
            overlay(each, FollowedScheduler)


def peak_rates(view: View, optimizers: Iterable[Optimizer]) -> tuple[list[float], list[float]]:
    """Return the highest rates of groups with adapters, and of those with anything else. Empty ones are among these."""
    adapters, found, others = set(view.adapters.values()), set[float](), set[float]()
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        held = set(group["params"])
        if held & adapters:
            found.add(_peak_rate(group))
        if held - adapters or not held:
            others.add(_peak_rate(group))
    return sorted(found), sorted(others)


def rates_by_layer(view: View, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Return the highest rate of each layer's adapters: in LoRA+, that of B. Those in no optimizer are left out."""
    rates = dict[nn.Parameter, float]()
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        for p in group["params"]:
            rates[p] = max(_peak_rate(group), rates.get(p, 0))
    highest = dict[str, float]()
    for name, layer in view.layers.items():
        own = [rates[p] for p in layer.lora_trained() if p in rates]
        if own:
            highest[name] = max(own)
    return highest


def _peak_rate(group: dict[str, Any]) -> float:
    """The highest rate of a group: a scheduler may begin with a lower one."""
    return max(float(group.get(key) or 0) for key in ("lr", "initial_lr", "max_lr"))

"""Learning rates of adapters that are multiples of the module's (``lr_scale``).

Such adapters are in groups of their own, behind the module's groups, whose numbers stay. Schedulers see only the
module's groups. The others follow.
"""

import math
from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_lora.errors import ConfigError, OptimizerError
from lightning_lora.layers.matrices import Role
from lightning_lora.model.view import View
from lightning_lora.tensors.inplace import InPlace, overlay
from lightning_lora.tensors.names import own_parameter

Params = list[nn.Parameter]
Scale = float | dict[str, float]
Scales = dict[int, tuple[str, float]]

_FACTORS = {Role.A: "A", Role.B: "B", Role.MAGNITUDE: "A"}
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_ALIKE = ("momentum", "betas", "weight_decay")

_BEHIND: "WeakKeyDictionary[Optimizer, tuple[slice, list[tuple[int, float]], Any]]" = WeakKeyDictionary()
"""Where an optimizer has groups of adapters, which group each follows at which scale, and the hook."""
_NOTHING: tuple[slice, list[tuple[int, float]], Any] = slice(0, 0), [], None


def scales_of(lr_scale: Scale) -> dict[str, float]:
    """Return the scale of A and that of B."""
    scales: dict[str, Any] = lr_scale if isinstance(lr_scale, dict) else {"A": lr_scale, "B": lr_scale}
    numbers = [isinstance(each, int | float) and each is not True and 0 < each < math.inf for each in scales.values()]
    if scales.keys() - {"A", "B"} or not all(numbers):
        raise ConfigError(
            f"lr_scale={lr_scale!r} is not valid. Expected a number above zero, or one each, as {{'A': 10, 'B': 160}}."
        )
    return {"A": 1, "B": 1, **scales}


def scales_in(view: View, lr_scale: Scale) -> Scales:
    """Return the scale of each adapter with another rate, by its id, and what to call its group."""
    scales, found = scales_of(lr_scale), Scales()
    for layer in view.layers.values():
        for name, about in layer.lora_roles().items():
            factor = _FACTORS.get(about.role)
            if factor and scales[factor] != 1:
                title = "lora" if scales["A"] == scales["B"] else f"lora_{factor}"
                found[id(own_parameter(layer, name))] = title, scales[factor]
    return found


def check_splits(optimizer: Optimizer, groups: list[Params], scales: Scales) -> None:
    """Refuse an optimizer that cannot have several rates."""
    has_one = isinstance(optimizer, LBFGS) or any(group.get("lr") is None for group in optimizer.param_groups)
    if has_one and not all(scales.keys().isdisjoint(map(id, parameters)) for parameters in groups):
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
            kinds.setdefault(scales.get(id(p)), []).append(p)
        kept.append(kinds.pop(None))
        for (title, scale), adapters in kinds.items():
            group = optimizer.param_groups[number]
            name = f"{group.get('name', f'pg{number + 1}')}-{title}"  # LearningRateMonitor refuses equal names
            optimizer.param_groups.append(deepcopy({**group, "params": [], "name": name}))
            moved.append(adapters)
            follows.append((number, scale))
    if moved:
        hook = optimizer.register_step_pre_hook(_follow_in_step)
        _BEHIND[optimizer] = slice(len(kept), len(kept + moved)), follows, hook
        follow(optimizer)
    return kept + moved


def join(optimizer: Optimizer) -> None:
    """Undo a split: a module may return the same optimizer in its next fit."""
    place, follows, hook = _BEHIND.pop(optimizer, _NOTHING)
    for group, (number, _) in zip(optimizer.param_groups[place], follows, strict=True):
        optimizer.param_groups[number]["params"].extend(group["params"])
    del optimizer.param_groups[place]
    if hook is not None:
        hook.remove()


def follow(*optimizers: Any) -> None:
    """Give the groups behind the rates of those that they follow, scaled. A tensor stays the same one."""
    for each in optimizers:
        optimizer = each if each in _BEHIND else getattr(each, "optimizer", each)  # DeepSpeed's has it inside
        (place, follows, _), groups = _BEHIND.get(optimizer, _NOTHING), optimizer.param_groups
        for own, (number, scale) in zip(groups[place], follows, strict=False):  # in DeepSpeed's steps, it has one group
            for key, value in groups[number].items():
                if key in _SCALED:
                    own[key] = own[key].copy_(value * scale) if isinstance(own.get(key), Tensor) else value * scale
                elif key in _ALIKE:
                    own[key] = value


def _follow_in_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Follow what other code wrote, such as a warm-up by hand: one rate in all groups is meant as the module's."""
    follow(optimizer)
    if closure := kwargs.get("closure"):  # its hooks may write rates too
        return args, {**kwargs, "closure": lambda: (closure(), follow(optimizer))[0]}  # type: ignore[func-returns-value]
    return None


class FollowedScheduler(InPlace):
    """Added to the class of a scheduler, which sees only the module's groups from then on."""

    overlaid_prefix: ClassVar[str] = "_"  # LightningCLI looks up names of schedulers, but no private ones
    optimizer: Optimizer

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Take the scheduler's own step, and follow it."""
        (place, _, _), groups = _BEHIND.get(self.optimizer, _NOTHING), self.optimizer.param_groups
        own, groups[place] = groups[place], []
        try:
            super().step(*args, **kwargs)  # type: ignore[misc]
        finally:
            groups[place.start : place.start] = own
        follow(self.optimizer)


def hide_groups(schedulers: Iterable[object], model: nn.Module) -> None:
    """Let schedulers see only the module's groups: those of the Trainer, and those that the module keeps itself."""
    for each in (*schedulers, *vars(model).values()):
        if isinstance(each, LRScheduler) and not isinstance(each, FollowedScheduler) and each.optimizer in _BEHIND:
            overlay(each, FollowedScheduler)


def peak_rates(view: View, optimizers: Iterable[Optimizer]) -> tuple[list[float], list[float]]:
    """Return the highest rates of the groups that hold adapters, and of those that hold something else, or nothing."""
    adapters, found, others = set(map(id, view.adapters.values())), set[float](), set[float]()
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        held = set(map(id, group["params"]))
        rate = max(float(group.get(key) or 0) for key in ("lr", "initial_lr", "max_lr"))
        if held & adapters:
            found.add(rate)
        if held - adapters or not held:
            others.add(rate)
    return sorted(found), sorted(others)

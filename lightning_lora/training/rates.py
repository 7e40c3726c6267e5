"""Learning rates of adapters that are multiples of the module's: their groups follow behind, unseen by schedulers."""

import math
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, ClassVar, NamedTuple
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
Group = dict[str, Any]
Scale = float | dict[str, float]


class AdapterScale(NamedTuple):
    """How the rate of an adapter's parameter differs from the module's."""

    title: str  # the end of its group's name
    scale: float


Scales = dict[nn.Parameter, AdapterScale]

_FACTORS = {Role.A: "A", Role.B: "B", Role.MAGNITUDE: "A"}
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_ALIKE = ("momentum", "betas", "weight_decay")


class _Followed(NamedTuple):
    """The module's group that a group behind follows."""

    number: int
    scale: float


class _Before(NamedTuple):
    """An adapter's parameter, and its value before a step."""

    parameter: nn.Parameter
    value: Tensor


@dataclass
class _Behind:
    """The groups of adapters behind the module's groups of one optimizer."""

    place: slice
    follows: list[_Followed]  # one for each group
    hooks: list[RemovableHandle]
    hidden: list[Group] = field(default_factory=list)  # the groups, in a scheduler's step
    before: list[_Before] = field(default_factory=list)  # in a step, until one is seen
    is_seen: bool = False  # whether a step has changed an adapter, or kept a state for it
    is_due: bool = False  # whether one has had a gradient, which a step may end without

    def note_gradients(self) -> None:
        """Note whether an adapter has a gradient to learn from."""
        if any(_can_learn(each.parameter) for each in self.before):
            self.is_due = True


_BEHIND: "WeakKeyDictionary[Optimizer, _Behind]" = WeakKeyDictionary()
"""What an optimizer has behind the module's groups."""


# Scales


def scales_of(lr_scale: Scale) -> dict[str, float]:
    """Return the scale of A and that of B."""
    scales: dict[str, Any] = lr_scale if isinstance(lr_scale, dict) else {"A": lr_scale, "B": lr_scale}
    unknown = scales.keys() - {"A", "B"}
    if unknown or not all(map(_is_scale, scales.values())):
        raise ConfigError(
            f"lr_scale={lr_scale!r} is not valid. Expected a number above zero, or two: {{'A': 10, 'B': 160}}."
        )
    return {"A": 1, "B": 1, **scales}


def _is_scale(value: object) -> bool:
    """Whether a value is a finite number above zero."""
    return isinstance(value, int | float) and value is not True and 0 < value < math.inf


def scales_in(view: View, lr_scale: Scale) -> Scales:
    """Return the scale of each adapter with another rate, and its group's name."""
    scales = scales_of(lr_scale)
    has_one_scale = scales["A"] == scales["B"]
    found: Scales = {}
    for layer in view.layers.values():
        for name, about in layer.lora_roles().items():
            factor = _FACTORS.get(about.role)
            if factor is None or scales[factor] == 1:
                continue
            title = "lora" if has_one_scale else f"lora_{factor}"
            found[own_parameter(layer, name)] = AdapterScale(title, scales[factor])
    return found


# Groups behind


def check_splits(optimizer: Optimizer, groups: list[Params], scales: Scales) -> None:
    """Refuse an optimizer that cannot have several rates."""
    has_one_rate = isinstance(optimizer, LBFGS) or any(group.get("lr") is None for group in optimizer.param_groups)
    if has_one_rate and not scales.keys().isdisjoint(chain.from_iterable(groups)):
        raise OptimizerError(
            f"{type(optimizer).__name__} takes no learning rate for each group of parameters, so lr_scale cannot act. "
            "Leave lr_scale out, or use another optimizer."
        )


def split(optimizer: Optimizer, groups: list[Params], scales: Scales) -> list[Params]:
    """Add a group for each group's adapters of one scale. Return the parameters that each group is to have."""
    of_module: list[Params] = []
    of_adapters: list[Params] = []
    follows: list[_Followed] = []
    for number, parameters in enumerate(groups):
        of_module.append([p for p in parameters if p not in scales])
        for (title, scale), adapters in _by_scale(parameters, scales).items():
            optimizer.param_groups.append(_group_behind(optimizer, number, title))
            of_adapters.append(adapters)
            follows.append(_Followed(number, scale))
    split_groups = of_module + of_adapters
    if of_adapters:
        place = slice(len(of_module), len(split_groups))
        _BEHIND[optimizer] = _Behind(place, follows, _register_hooks(optimizer))
        follow(optimizer)
    return split_groups


def _by_scale(parameters: Params, scales: Scales) -> dict[AdapterScale, Params]:
    """The adapters among these parameters, by their scale."""
    adapters: dict[AdapterScale, Params] = {}
    for p in parameters:
        if p in scales:
            adapters.setdefault(scales[p], []).append(p)
    return adapters


def _group_behind(optimizer: Optimizer, number: int, title: str) -> Group:
    """A group like one of the module's, still empty. LearningRateMonitor refuses equal names."""
    group = optimizer.param_groups[number]
    name = group.get("name", f"pg{number + 1}")
    return deepcopy({**group, "params": [], "name": f"{name}-{title}"})


def _register_hooks(optimizer: Optimizer) -> list[RemovableHandle]:
    """Watch the optimizer's steps, and what it loads."""
    return [
        optimizer.register_load_state_dict_pre_hook(_check_stored),
        optimizer.register_step_pre_hook(_begin_step),
        optimizer.register_step_post_hook(_end_step),
    ]


def unsplit(optimizer: Optimizer) -> None:
    """Undo a split: a module may return the same optimizer in its next fit."""
    behind = _BEHIND.pop(optimizer, None)
    if behind is None:
        return
    groups = optimizer.param_groups
    for group, followed in zip(groups[behind.place], behind.follows, strict=True):
        groups[followed.number]["params"].extend(group["params"])
    del groups[behind.place]
    for hook in behind.hooks:
        hook.remove()


def follow(*optimizers: Any) -> None:
    """Give the groups behind the rates of those that they follow, scaled. A tensor stays the same one."""
    for each in optimizers:
        optimizer = each if each in _BEHIND else getattr(each, "optimizer", each)  # DeepSpeed's has it inside
        behind = _BEHIND.get(optimizer)
        if behind is None:
            continue
        groups = optimizer.param_groups
        for group, followed in zip(groups[behind.place], behind.follows, strict=False):  # DeepSpeed steps one
            _follow_group(group, groups[followed.number], followed.scale)


def _follow_group(group: Group, of_module: Group, scale: float) -> None:
    """Give one group the rates of the one that it follows."""
    for key, value in of_module.items():
        if key in _ALIKE:
            group[key] = value
        elif key in _SCALED:
            rate = value * scale
            if isinstance(group.get(key), Tensor):
                group[key].copy_(rate)
            else:
                group[key] = rate


def _check_stored(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse the states of A for B: the sizes may be the same."""
    place = _BEHIND[optimizer].place
    stored = [group.get("name") for group in state["param_groups"][place]]
    here = [group.get("name") for group in optimizer.param_groups[place]]
    if stored != here:
        raise ValueError(f"its parameter groups of adapters are {stored}, and the module's {here}")


# Steps of the optimizer


def _begin_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Follow what other code wrote, such as a warm-up by hand: one rate in all groups is meant as the module's."""
    _unhide(optimizer)  # a scheduler may call us
    behind = _BEHIND[optimizer]
    may_skip = hasattr(optimizer, "found_inf")  # by which a GradScaler may skip the step
    if not behind.is_seen and not may_skip:
        behind.before += _values_before(optimizer.param_groups[behind.place])
    closure = kwargs.get("closure")
    if closure:
        return args, {**kwargs, "closure": partial(_with_closure, closure, optimizer)}
    behind.note_gradients()
    return None


def _values_before(groups: list[Group]) -> Iterator[_Before]:
    """Copies of what these groups hold, unless their rate is zero."""
    for group in groups:
        if group["lr"] > 0:
            for p in group["params"]:
                yield _Before(p, to_local(p).detach().clone())


def _with_closure(closure: Callable[[], Any], optimizer: Optimizer) -> Any:
    """Run the closure of a step. Its hooks may write rates too."""
    loss = closure()
    follow(optimizer)
    _BEHIND[optimizer].note_gradients()
    return loss


def _can_learn(p: nn.Parameter) -> bool:
    """Whether a parameter has a gradient that is finite and not zero."""
    if p.grad is None:
        return False
    return bool(0 < to_local(p.grad).norm() < math.inf)


def _end_step(optimizer: Optimizer, *_: Any) -> None:
    """Refuse an optimizer that keeps a list of groups of its own: it never trains those behind."""
    behind = _BEHIND[optimizer]
    behind.note_gradients()
    if any(_was_trained(optimizer, each) for each in behind.before):
        behind.is_seen = True
    behind.before.clear()
    if behind.is_due and not behind.is_seen:
        raise OptimizerError(
            f"{type(optimizer).__name__} did not train the adapters: it does not look at the parameter groups that "
            "lr_scale adds. Leave lr_scale out, or use another optimizer."
        )


def _was_trained(optimizer: Optimizer, before: _Before) -> bool:
    """Whether a step has changed a parameter, or kept a state for it."""
    p = before.parameter
    return p in optimizer.state or not torch.equal(to_local(p), before.value)


# Schedulers


class FollowedScheduler(InPlace):
    """Added to the class of a scheduler, which then sees only the module's groups."""

    overlaid_prefix: ClassVar[str] = "_"  # LightningCLI looks up names of schedulers, but no private ones
    optimizer: Optimizer

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the scheduler's own step, and follow it."""
        behind = _BEHIND.get(self.optimizer)
        if behind is None or behind.hidden:  # by a scheduler that calls this one
            return super().step(*args, **kwargs)  # type: ignore[misc]
        groups = self.optimizer.param_groups
        behind.hidden = groups[behind.place]
        del groups[behind.place]
        try:
            return super().step(*args, **kwargs)  # type: ignore[misc]
        finally:
            _unhide(self.optimizer)


def _unhide(optimizer: Optimizer) -> None:
    """Put back what a scheduler does not see."""
    behind = _BEHIND[optimizer]
    start = behind.place.start
    optimizer.param_groups[start:start] = behind.hidden
    behind.hidden = []
    follow(optimizer)


def hide_groups(schedulers: Iterable[object], model: nn.Module) -> None:
    """Let schedulers see only the module's groups: those of the Trainer, and those that the module keeps itself."""
    for each in _with_contents([*schedulers, *vars(model).values()]):
        if _is_scheduler(each) and each.optimizer in _BEHIND and not isinstance(each, FollowedScheduler):
            overlay(each, FollowedScheduler)


def _with_contents(values: list[Any]) -> list[Any]:
    """These values, and what those hold that are dicts, lists or tuples."""
    inside: list[Any] = []
    for value in values:
        if isinstance(value, dict):
            inside += value.values()
        elif isinstance(value, list | tuple):
            inside += value
    return values + inside


def _is_scheduler(each: Any) -> bool:
    """Whether an object is a scheduler of any class: it steps an optimizer, and is none."""
    return hasattr(each, "step") and not hasattr(each, "zero_grad") and hasattr(each, "optimizer")


# Highest rates


def peak_rates(view: View, optimizers: Iterable[Optimizer]) -> tuple[list[float], list[float]]:
    """Return the highest rates of groups with adapters, and of those with anything else. Empty ones are among these."""
    adapters = set(view.adapters.values())
    of_adapters: set[float] = set()
    of_others: set[float] = set()
    for group in _groups_of(optimizers):
        parameters = set(group["params"])
        rate = _peak_rate(group)
        if parameters & adapters:
            of_adapters.add(rate)
        if parameters - adapters or not parameters:
            of_others.add(rate)
    return sorted(of_adapters), sorted(of_others)


def rates_by_layer(view: View, optimizers: Iterable[Optimizer]) -> dict[str, float]:
    """Return the highest rate of each layer's adapters: in LoRA+, that of B. Those in no optimizer are left out."""
    rates: dict[nn.Parameter, float] = {}
    for group in _groups_of(optimizers):
        rate = _peak_rate(group)
        for p in group["params"]:
            rates[p] = max(rate, rates.get(p, 0))
    highest: dict[str, float] = {}
    for name, layer in view.layers.items():
        of_layer = [rates[p] for p in layer.lora_trained() if p in rates]
        if of_layer:
            highest[name] = max(of_layer)
    return highest


def _groups_of(optimizers: Iterable[Optimizer]) -> Iterator[Group]:
    """All groups of these optimizers."""
    for optimizer in optimizers:
        yield from optimizer.param_groups


def _peak_rate(group: Group) -> float:
    """The highest rate of a group: a scheduler may begin with a lower one."""
    rates = [group.get(key) for key in ("lr", "initial_lr", "max_lr")]
    numbers = [float(rate) for rate in rates if rate is not None]
    return max([*numbers, 0.0])  # without a rate, zero

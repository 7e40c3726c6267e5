"""Learning rates of adapters that are multiples of the module's: their groups follow behind the module's groups."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.errors import OptimizerError
from lightning_lora.training.optimizers.groups import Group, Params, listed_parameters, parameters_in, settings_of
from lightning_lora.training.optimizers.scales import AdapterScale, Scales
from lightning_lora.training.optimizers.watched_steps import WatchedSteps

_SCALED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_ALIKE = ("momentum", "betas", "weight_decay")


class _Followed(NamedTuple):
    """The module's group that a group behind follows."""

    number: int
    scale: float


@dataclass
class _Behind:
    """The groups of adapters behind the module's groups of one optimizer. By default, there are none."""

    first: int = 0
    follows: list[_Followed] = field(default_factory=list)  # one for each group
    hooks: list[RemovableHandle] = field(default_factory=list)
    hidden: list[Group] = field(default_factory=list)  # the groups, in a scheduler's step
    steps: WatchedSteps = field(default_factory=WatchedSteps)

    @property
    def place(self) -> slice:
        """Where they stand among the optimizer's groups."""
        return slice(self.first, self.first + len(self.follows))

    def pairs(self, groups: list[Group]) -> Iterator[tuple[Group, Group, float]]:
        """Yield each of an optimizer's groups that is behind, the one of the module that it follows, and its scale."""
        for group, followed in zip(groups[self.place], self.follows, strict=False):  # DeepSpeed steps one at a time
            yield group, groups[followed.number], followed.scale


_BEHIND: "WeakKeyDictionary[Optimizer, _Behind]" = WeakKeyDictionary()
"""What an optimizer has behind the module's groups."""


# Split, and undo it


def check_splits(optimizer: Optimizer, groups: list[Params], scales: Scales) -> None:
    """Refuse an optimizer that cannot have several rates."""
    is_unscaled = scales.keys().isdisjoint(parameters_in(groups))
    if is_unscaled or _has_rates(optimizer):
        return
    raise OptimizerError(
        f"{type(optimizer).__name__} takes no learning rate for each group of parameters, so lr_scale cannot act. "
        "Leave lr_scale out, or use another optimizer."
    )


def _has_rates(optimizer: Optimizer) -> bool:
    """Whether an optimizer has a learning rate for each of its groups."""
    rates = settings_of(optimizer.param_groups, "lr")
    return not isinstance(optimizer, LBFGS) and None not in rates


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
        _BEHIND[optimizer] = _Behind(len(of_module), follows, _register_hooks(optimizer))
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
    behind = _BEHIND.pop(optimizer, _Behind())
    groups = optimizer.param_groups
    for group, of_module, _ in behind.pairs(groups):
        of_module["params"].extend(group["params"])
    del groups[behind.place]
    for hook in behind.hooks:
        hook.remove()


def groups_without_split(optimizer: Optimizer) -> list[Params]:
    """Return the parameters of each of the module's groups as :func:`unsplit` will leave them."""
    groups = listed_parameters(optimizer)
    behind = _BEHIND.get(optimizer, _Behind())
    for parameters, followed in zip(groups[behind.place], behind.follows, strict=True):
        groups[followed.number] += parameters
    del groups[behind.place]
    return groups


# Rates


def is_split(optimizer: Optimizer) -> bool:
    """Whether adapters have groups of their own behind the module's."""
    return optimizer in _BEHIND


def follow(*optimizers: Any) -> None:
    """Give the groups behind the rates of those that they follow, scaled. A tensor stays the same one."""
    for each in optimizers:
        optimizer = each if each in _BEHIND else getattr(each, "optimizer", each)  # DeepSpeed's has it inside
        if optimizer in _BEHIND:
            for group, of_module, scale in _BEHIND[optimizer].pairs(optimizer.param_groups):
                _follow_group(group, of_module, scale)


def _follow_group(group: Group, of_module: Group, scale: float) -> None:
    """Give one group the rates of the one that it follows."""
    for key, value in of_module.items():
        if key in _ALIKE:
            group[key] = value
        elif key in _SCALED:
            _set_rate(group, key, value * scale)


def _set_rate(group: Group, key: str, rate: Any) -> None:
    """Set a rate. A tensor, which a captured graph reads, stays the same one."""
    if isinstance(group.get(key), Tensor):
        group[key].copy_(rate)
    else:
        group[key] = rate


def hide_behind(optimizer: Optimizer) -> bool:
    """Hide the groups behind from a scheduler. Return False if they are hidden already."""
    behind = _BEHIND.get(optimizer, _Behind())
    if behind.hidden:
        return False
    groups = optimizer.param_groups
    behind.hidden = groups[behind.place]
    del groups[behind.place]
    return True


def show_behind(optimizer: Optimizer) -> None:
    """Put back what a scheduler does not see, with rates as it has set them."""
    behind = _BEHIND.get(optimizer, _Behind())
    optimizer.param_groups[behind.first : behind.first] = behind.hidden
    behind.hidden = []
    follow(optimizer)


# In the optimizer's own methods


def _check_stored(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuse the states of A for B: the sizes may be the same."""
    place = _BEHIND[optimizer].place
    stored = settings_of(state["param_groups"][place], "name")
    here = settings_of(optimizer.param_groups[place], "name")
    if stored != here:
        raise ValueError(f"its parameter groups of adapters are {stored}, and the module's {here}")


def _begin_step(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> Any:
    """Follow what other code wrote, such as a warm-up by hand: one rate in all groups is meant as the module's."""
    show_behind(optimizer)  # a scheduler may call us
    behind = _BEHIND[optimizer]
    behind.steps.begin(optimizer, optimizer.param_groups[behind.place])
    closure = kwargs.get("closure")
    if closure:
        return args, {**kwargs, "closure": partial(_with_closure, closure, optimizer)}
    behind.steps.note_gradients()
    return None


def _with_closure(closure: Callable[[], Any], optimizer: Optimizer) -> Any:
    """Run the closure of a step. Its hooks may write rates too."""
    loss = closure()
    follow(optimizer)
    _BEHIND[optimizer].steps.note_gradients()
    return loss


def _end_step(optimizer: Optimizer, *_: Any) -> None:
    """Refuse an optimizer that never trains the groups behind."""
    _BEHIND[optimizer].steps.end(optimizer)

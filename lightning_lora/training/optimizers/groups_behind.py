"""Groups of adapters behind the module's groups: each has the rates of one of these, scaled.

Schedulers do not know of them. So they are hidden while one steps, and then mirror the rates that it has set.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lora.training.optimizers.groups import Group
from lightning_lora.training.optimizers.watched_steps import WatchedSteps

_SCALED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
_ALIKE = ("momentum", "betas", "weight_decay")


class Mirrored(NamedTuple):
    """The module's group that a group behind mirrors."""

    number: int
    scale: float


@dataclass
class Behind:
    """The groups of adapters behind the module's groups of one optimizer. By default, there are none."""

    first: int = 0
    mirrored: list[Mirrored] = field(default_factory=list)  # one for each group
    hooks: list[RemovableHandle] = field(default_factory=list)
    hidden: list[Group] = field(default_factory=list)  # the groups, in a scheduler's step
    steps: WatchedSteps = field(default_factory=WatchedSteps)

    @property
    def slice(self) -> slice:
        """Where they stand among the optimizer's groups."""
        return slice(self.first, self.first + len(self.mirrored))

    def pairs(self, groups: list[Group]) -> Iterator[tuple[Group, Group, float]]:
        """Yield each group behind, the module's group that it mirrors, and its scale.

        In a step of DeepSpeed, the optimizer has only one of its groups: then there may be none behind.
        """
        for group, mirrored in zip(groups[self.slice], self.mirrored, strict=False):
            yield group, groups[mirrored.number], mirrored.scale


BEHIND: "WeakKeyDictionary[Optimizer, Behind]" = WeakKeyDictionary()
"""What an optimizer has behind the module's groups.

Between two steps it refers to no parameter, of which one may refer to the optimizer. So nothing keeps the key alive.
"""


def has_groups_behind(optimizer: Optimizer) -> bool:
    """Whether adapters have groups of their own behind the module's."""
    return optimizer in BEHIND


# Rates


def mirror_rates(*optimizers: Any) -> None:
    """Give the groups behind the rates of those that they mirror, scaled."""
    for each in optimizers:
        optimizer = each if each in BEHIND else getattr(each, "optimizer", each)  # DeepSpeed's has it inside
        if optimizer in BEHIND:
            for group, of_module, scale in BEHIND[optimizer].pairs(optimizer.param_groups):
                _mirror_group(group, of_module, scale)


def _mirror_group(group: Group, of_module: Group, scale: float) -> None:
    """Give one group the rates of the one that it mirrors."""
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


# Hidden from schedulers


def hide_behind(optimizer: Optimizer) -> bool:
    """Hide the groups behind from a scheduler. Return False if they are hidden already."""
    behind = BEHIND.get(optimizer, Behind())
    if behind.hidden:
        return False
    groups = optimizer.param_groups
    behind.hidden = groups[behind.slice]
    del groups[behind.slice]
    return True


def show_behind(optimizer: Optimizer) -> None:
    """Put the hidden groups back, with the rates that a scheduler has set."""
    behind = BEHIND.get(optimizer, Behind())
    optimizer.param_groups[behind.first : behind.first] = behind.hidden
    behind.hidden = []
    mirror_rates(optimizer)

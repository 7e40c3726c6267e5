"""Parameter groups of optimizers, and which parameters they hold."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

Params = list[nn.Parameter]
Group = dict[str, Any]


def groups_of(optimizers: Iterable[Optimizer]) -> Iterator[Group]:
    """Yield all groups of some optimizers."""
    for optimizer in optimizers:
        yield from optimizer.param_groups


def held_by(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """Return the parameters that some optimizers hold."""
    return parameters_in(group["params"] for group in groups_of(optimizers))


def parameters_in(groups: Iterable[Params]) -> set[nn.Parameter]:
    """Return the parameters of some groups."""
    return set[nn.Parameter]().union(*groups)


def settings_of(groups: Iterable[Group], key: str) -> list[Any]:
    """Return what each group has as a setting, or None."""
    return [group.get(key) for group in groups]

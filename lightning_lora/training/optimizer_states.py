"""States of optimizers in a file that are those of optimizers of another class."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import listed

_NOT_SETTINGS = {"params", "param_names", "name"}
_BY_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"}


@contextmanager
def states_fit(optimizers: Sequence[Any], states: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Load states inside the ``with`` block. Refuse those of other classes; the optimizers are then as before.

    torch would load them: an optimizer takes its settings from them too, and fails in a step if one is missing.
    """
    loading = [(each, stored) for each, stored in zip(optimizers, states, strict=False) if isinstance(each, Optimizer)]
    before = [([dict(group) for group in each.param_groups], dict(each.state)) for each, _ in loading]
    try:
        yield
        for (optimizer, _), (groups, _) in zip(loading, before, strict=True):
            _check_settings(optimizer, groups)
    except Exception as error:
        for (optimizer, stored), (groups, state) in zip(loading, before, strict=True):
            optimizer.param_groups[:] = groups
            optimizer.state.clear()
            optimizer.state.update(state)
            if other := _other_class(optimizer, stored):
                raise ValueError(other) from error
        raise


def _check_settings(optimizer: Optimizer, before: list[dict[str, Any]]) -> None:
    """Refuse groups that have lost settings."""
    for was, now in zip(before, optimizer.param_groups, strict=False):
        if lost := _settings(was) - _settings(now):
            raise ValueError(f"it lacks the settings {listed(sorted(lost))} of {type(optimizer).__name__}")


def _other_class(optimizer: Optimizer, stored: dict[str, Any]) -> str:
    """Say of which class a state is, if of another one, or return an empty text."""
    now, groups = type(optimizer).__name__, stored.get("param_groups") or [{}]
    theirs = _settings(groups[0])
    if theirs == _settings(optimizer.param_groups[0]) or now in (known := classes_with(theirs)) or not known:
        return ""
    return f"it has the state of {' or '.join(known)}, and configure_optimizers returns {now}"


def classes_with(settings: set[str]) -> list[str]:
    """Return the names of torch's optimizers whose parameter groups have these settings."""
    found = list[str]()
    for name, kind in vars(torch.optim).items():
        if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer:
            make: Any = kind
            sample = make([nn.Parameter(torch.zeros(1, 1))], lr=0.1)
            if _settings(sample.param_groups[0]) == settings:
                found.append(name)
    return found


def _settings(group: dict[str, Any]) -> set[str]:
    return group.keys() - _NOT_SETTINGS - _BY_SCHEDULERS

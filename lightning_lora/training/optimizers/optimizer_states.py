"""A file's states of optimizers of another class: they are refused, and nothing is changed."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import listed
from lightning_lora.tensors.dicts import where
from lightning_lora.training.optimizers.groups import Group, torch_optimizers

_NOT_SETTINGS = {"params", "param_names", "name"}
# settings that schedulers add to groups
_BY_SCHEDULERS = {
    "initial_lr",
    "max_lr",
    "min_lr",
    "swa_lr",
    "max_momentum",
    "base_momentum",
}


@contextmanager
def refusing_other_states(
    optimizers: Sequence[Any], states: Sequence[dict[str, Any]]
) -> Iterator[None]:
    """Load states inside the ``with`` block. Refuse states of optimizers of other classes.

    After an error, all optimizers are as before. torch would load such a state: an
    optimizer takes its settings from it too, and fails in a step if one is missing.
    """
    loading = list(map(_begin, torch_optimizers(optimizers), states))
    try:
        yield
        for each in loading:
            each.check_settings()
    except Exception as error:
        # all states are undone before the first explanation is raised
        for each in loading:
            each.undo()
        for each in loading:
            each.explain(error)
        raise


@dataclass(frozen=True)
class _Loading:
    """An optimizer that loads a state, and what it held before."""

    optimizer: Optimizer
    stored: dict[str, Any]
    groups: list[Group]
    state: dict[Any, Any]

    def check_settings(self) -> None:
        """Refuse groups that have lost settings."""
        for before, now in zip(self.groups, self.optimizer.param_groups, strict=False):
            lost = _settings(before) - _settings(now)
            if lost:
                raise ValueError(
                    f"it lacks the settings {listed(sorted(lost))} of "
                    f"{type(self.optimizer).__name__}"
                )

    def undo(self) -> None:
        """Give the optimizer what it held before."""
        self.optimizer.param_groups[:] = self.groups
        self.optimizer.state.clear()
        self.optimizer.state.update(self.state)

    def explain(self, error: Exception) -> None:
        """If the state is of another class, raise an error that names it."""
        settings = _settings(_first_group(self.stored))
        if settings == _settings(self.optimizer.param_groups[0]):
            return
        here = type(self.optimizer).__name__
        classes = classes_with(settings)
        if classes and here not in classes:
            theirs = " or ".join(classes)
            raise ValueError(
                f"it has the state of {theirs}, and configure_optimizers returns {here}"
            ) from error


def _begin(optimizer: Optimizer, stored: dict[str, Any]) -> _Loading:
    """Note what an optimizer holds before it loads a state."""
    groups = [dict(group) for group in optimizer.param_groups]
    return _Loading(optimizer, stored, groups, dict(optimizer.state))


def _first_group(stored: dict[str, Any]) -> Group:
    """The first group of a state, or an empty one: files may lack groups."""
    groups: list[Group] = stored.get("param_groups") or [{}]
    return groups[0]


def classes_with(settings: set[str]) -> list[str]:
    """Return the names of torch's optimizers whose parameter groups have these settings."""
    found: list[str] = []
    classes = where(vars(torch.optim), _is_optimizer_class)
    for name, optimizer_class in classes.items():
        sample = optimizer_class([nn.Parameter(torch.zeros(1, 1))], lr=0.1)
        if _settings(sample.param_groups[0]) == settings:
            found.append(name)
    return found


def _is_optimizer_class(kind: object) -> bool:
    """Whether this is a class of optimizers, and not the one above all."""
    return (
        inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
    )


def _settings(group: Group) -> set[str]:
    """The names of the settings that an optimizer's class has given to a group."""
    return group.keys() - _NOT_SETTINGS - _BY_SCHEDULERS

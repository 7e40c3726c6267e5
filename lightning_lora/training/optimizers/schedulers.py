"""Schedulers see only the module's groups, and no groups behind them."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from lightning_lora.tensors.inplace import InPlace, overlay
from lightning_lora.training.optimizers.groups_behind import has_groups_behind, hide_behind, show_behind


class FollowedScheduler(InPlace):
    """A scheduler that sees only the module's groups: this is added to its class."""

    overlaid_prefix: ClassVar[str] = "_"  # LightningCLI looks up names of schedulers, but no private ones
    optimizer: Optimizer

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the scheduler's own step. Then the groups behind mirror its rates."""
        has_hidden = hide_behind(self.optimizer)  # not by a scheduler that another one calls
        try:
            return super().step(*args, **kwargs)  # type: ignore[misc]
        finally:
            if has_hidden:
                show_behind(self.optimizer)


def hide_groups(schedulers: Iterable[object], model: nn.Module) -> None:
    """Let schedulers see only the module's groups: those of the Trainer, and those that the module keeps itself."""
    for each in _with_contents([*schedulers, *vars(model).values()]):
        if _is_scheduler(each) and has_groups_behind(each.optimizer) and not isinstance(each, FollowedScheduler):
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

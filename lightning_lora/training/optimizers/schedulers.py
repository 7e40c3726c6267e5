"""Schedulers see only the groups that the module's code has built, and no scaled ones."""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from lightning_lora.tensors.inplace import InPlace, overlay
from lightning_lora.training.optimizers.scaled_groups import find_scaled_groups


class SchedulerOfModuleGroups(InPlace):
    """Added to a scheduler's class: it steps while scaled groups are hidden, which then get its rates."""

    # LightningCLI looks up names of schedulers, but no private ones
    overlaid_prefix: ClassVar[str] = "_"
    optimizer: Optimizer

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take the scheduler's own step."""
        scaled = find_scaled_groups(self.optimizer)
        if scaled is None:  # in a later fit
            return super().step(*args, **kwargs)  # type: ignore[misc]
        with scaled.hidden():
            return super().step(*args, **kwargs)  # type: ignore[misc]


def hide_scaled_groups(schedulers: Iterable[object], model: nn.Module) -> None:
    """Let schedulers see only the module's groups: those of the Trainer, and those that the module keeps itself."""
    for each in _with_contents([*schedulers, *vars(model).values()]):
        is_new = _is_scheduler(each) and not isinstance(each, SchedulerOfModuleGroups)
        if is_new and find_scaled_groups(each.optimizer) is not None:
            overlay(each, SchedulerOfModuleGroups)


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
    return (
        hasattr(each, "step")
        and not hasattr(each, "zero_grad")
        and hasattr(each, "optimizer")
    )

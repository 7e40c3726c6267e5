"""Parameter groups that code adds in the middle of a fit, as gradual unfreezing does."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import listed
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.names import owner_of


@contextmanager
def added_groups_fit(module: LightningModule) -> Iterator[None]:
    """Leave out of added groups what trains already, and what stays frozen below it: torch's error would end the fit.

    Code may call an optimizer, or Lightning's wrapper of it.
    """
    wrappers = module.optimizers()
    reached = [*module.trainer.optimizers, *(wrappers if isinstance(wrappers, list) else [wrappers])]
    changed = [each for each in reached if isinstance(each, Optimizer)]
    for optimizer in changed:
        vars(optimizer)["add_param_group"] = partial(_add_param_group, module, optimizer)
    try:
        yield
    finally:
        for optimizer in changed:
            vars(optimizer).pop("add_param_group", None)


def _add_param_group(model: nn.Module, optimizer: Optimizer, group: Any) -> None:
    """Add a group as the optimizer's own method does, without what it should not hold."""
    if isinstance(group, dict) and not isinstance(group.get("params"), set | None):  # torch says what is wrong there
        given = group["params"]
        group["params"] = [given] if isinstance(given, torch.Tensor) else list(given)
        _leave_out(view_of(model), optimizer, group)
    type(optimizer).add_param_group(optimizer, group)


def _leave_out(view: View, optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Leave out what the optimizer holds, and weights that stay frozen below or beside its adapters."""
    held = {p for each in optimizer.param_groups for p in each["params"]}
    added = {_parameter_of(item) for item in group["params"]}
    trained = {**view.adapters, **view.trained}
    twice = {name: p for name, p in trained.items() if p in added and p in held}
    busy = dict.fromkeys(map(owner_of, twice))
    for name, layer in view.layers.items():
        if not held.isdisjoint(layer.lora_trained()) and not added.isdisjoint(view.weights_of(name)):
            busy[name] = None
    if not busy:
        return
    frozen = {name: p for name, p in view.frozen.items() if p in added}
    left_out = {*twice.values(), *frozen.values()}
    group["params"] = [item for item in group["params"] if _parameter_of(item) not in left_out]
    _tell(busy, frozen)


def _parameter_of(item: Any) -> Any:
    """A parameter, which may come with its name."""
    return item[1] if isinstance(item, tuple) else item


def _tell(busy: Collection[str], frozen: Collection[str]) -> None:
    stays = f" Frozen weights stay frozen: {listed(frozen)}. To train some, use modules_to_save." if frozen else ""
    rank_zero_info(
        f"A parameter group was added in training. What trains in {listed(busy)} has its group already, and is left "
        f"out of the new one.{stays}"
    )

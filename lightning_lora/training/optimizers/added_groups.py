"""Parameter groups that code adds in the middle of a fit, as gradual unfreezing does."""

from collections.abc import Collection, Iterable, Iterator
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
from lightning_lora.tensors.dicts import with_values
from lightning_lora.tensors.names import owner_of
from lightning_lora.training.optimizers.groups import (
    Group,
    held_by,
    layers_trained_by,
    torch_optimizers,
)


@contextmanager
def trimming_added_groups(module: LightningModule) -> Iterator[None]:
    """Take out of groups that are added in the ``with`` block what trains already, and what stays frozen below it.

    torch refuses a parameter that is held already, which would end the fit.
    """
    # Lightning's wrappers of optimizers have an ``add_param_group`` too
    wrappers = module.optimizers()
    if not isinstance(wrappers, list):
        wrappers = [wrappers]
    changed = torch_optimizers([*module.trainer.optimizers, *wrappers])
    for optimizer in changed:
        vars(optimizer)["add_param_group"] = partial(
            _add_param_group, module, optimizer
        )
    try:
        yield
    finally:
        for optimizer in changed:
            vars(optimizer).pop("add_param_group", None)


def _add_param_group(model: nn.Module, optimizer: Optimizer, group: Any) -> None:
    """Add a group without what it should not hold.

    What torch takes for no group is left to torch: it says what is wrong.
    """
    if _is_group(group):
        given = group["params"]
        group["params"] = [given] if isinstance(given, torch.Tensor) else list(given)
        _trim(view_of(model), optimizer, group)
    type(optimizer).add_param_group(optimizer, group)


def _is_group(group: Any) -> bool:
    """Whether torch takes this for a group: its parameters have an order, so they are no set."""
    if not isinstance(group, dict):
        return False
    given = group.get("params")
    return isinstance(given, Iterable) and not isinstance(given, set)


def _trim(view: View, optimizer: Optimizer, group: Group) -> None:
    """Take out of a group what the optimizer trains already, and frozen weights.

    For example, gradual unfreezing adds ``[W, A, B, bias]`` of a layer whose A and B
    train: nothing is left. If the group has nothing to do with a layer that trains, it
    stays: its frozen weights are refused in the optimizer's next step.
    """
    held = held_by([optimizer])
    added = set(map(_parameter_of, group["params"]))
    trainable = {**view.adapter_parameters, **view.trainable_base}
    trained_already = with_values(trainable, held & added)
    layers = [*map(owner_of, trained_already), *_trained_layers(view, held, added)]
    if not layers:
        return
    frozen = with_values(view.frozen_base, added)
    left_out = {*trained_already.values(), *frozen.values()}
    group["params"] = [
        item for item in group["params"] if _parameter_of(item) not in left_out
    ]
    _tell(list(dict.fromkeys(layers)), frozen)


def _parameter_of(item: Any) -> Any:
    """The parameter of an item of a group, which is a pair if it comes with its name."""
    return item[1] if isinstance(item, tuple) else item


def _trained_layers(view: View, held: set[nn.Parameter], added: set[Any]) -> list[str]:
    """Layers whose weights are added, though the optimizer trains their adapters."""
    trained = layers_trained_by(held, view)
    return [
        name for name in trained if not added.isdisjoint(view.base_weights_of(name))
    ]


def _tell(layers: Collection[str], frozen: Collection[str]) -> None:
    """Say what was left out of an added group."""
    stays = ""
    if frozen:
        stays = (
            f" Frozen weights stay frozen: {listed(frozen)}. To train some, use "
            "modules_to_save."
        )
    rank_zero_info(
        f"A parameter group was added in training. What trains in {listed(layers)} has "
        f"its group already, and is left out of the new one.{stays}"
    )

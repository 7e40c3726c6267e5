"""Take adapters off frozen networks that feed nothing that trains, before the first optimizer step."""

from collections.abc import Mapping, Sequence, Set
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import StrategyError, listed
from lightning_lora.model.still.find_still import about_networks_left_out
from lightning_lora.model.still.settle import strip_adapters
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.dicts import with_values, without
from lightning_lora.tensors.names import names_inside, names_outside
from lightning_lora.training.optimizers.edits import rewrite_groups
from lightning_lora.training.optimizers.group_checks import no_place_error
from lightning_lora.training.optimizers.groups import groups_of, held_by
from lightning_lora.training.steps.feeding import Feeding


def remove_unfed(model: LightningModule, optimizer: Optimizer, strategy: Any, feeding: Feeding) -> bool:
    """Remove the adapters of networks that feed nothing. No optimizer has changed them yet.

    All processes judge together. Return whether there were such networks. Refuse one that feeds what trains, if no
    optimizer has a place for its adapters.
    """
    to_judge = _judged_with(optimizer, strategy.optimizers, feeding.unjudged)
    unfed, fed = feeding.judge(to_judge, strategy.reduce_boolean_decision)
    if fed:
        view = view_of(model)
        _check_places(view, fed, strategy.optimizers)
        _tell_of_fed(view, fed, unfed)
    if not unfed:
        return False
    view = view_of(model)
    said = about_networks_left_out(unfed, view.title)
    strip_adapters(view, unfed)
    rank_zero_info(said)
    _take_out_frozen(model, optimizer)
    return True


def refuse_unfed(model: LightningModule, strategy: Any, feeding: Feeding) -> None:
    """Refuse networks that feed nothing: DeepSpeed's optimizer cannot lose their adapters."""
    unfed, fed = feeding.judge(list(feeding.unjudged), strategy.reduce_boolean_decision)
    if fed:
        _tell_of_fed(view_of(model), fed, unfed)
    if unfed:
        said = about_networks_left_out(unfed, view_of(model).title)
        raise StrategyError(
            f"{said} DeepSpeed cannot take parameters out of a fit that has begun. "
            f"Name it yourself: exclude_modules={unfed}."
        )


def _judged_with(optimizer: Optimizer, optimizers: Sequence[Optimizer], networks: Mapping[str, Set[int]]) -> list[str]:
    """The networks that an optimizer trains, or that none does."""
    held_here = set(map(id, held_by([optimizer])))
    held_anywhere = set(map(id, held_by(optimizers)))
    judged = []
    for name, parameters in networks.items():
        if not held_here.isdisjoint(parameters) or held_anywhere.isdisjoint(parameters):
            judged.append(name)
    return judged


def _check_places(view: View, fed: Sequence[str], optimizers: Sequence[Optimizer]) -> None:
    """Refuse networks that feed what trains, if no optimizer holds their adapters."""
    placed = with_values(view.adapter_parameters, held_by(optimizers))
    unplaced = names_inside(without(view.adapter_parameters, placed), fed)
    if unplaced:
        raise no_place_error(view.title, unplaced, len(list(groups_of(optimizers))))


def _tell_of_fed(view: View, fed: Sequence[str], unfed: Sequence[str]) -> None:
    """Say that adapters train in a frozen network too, if others train besides."""
    others = names_outside(view.layers, (*fed, *unfed))
    if others:
        rank_zero_info(
            f"Without LoRACallback, only a head of {view.title} would train. With it, adapters train in {listed(fed)} "
            f"too. To leave that as it is: exclude_modules={fed}."
        )


def _take_out_frozen(model: nn.Module, optimizer: Optimizer) -> None:
    """Take parameters that train no more out of the groups."""
    view = view_of(model)
    trained = set(model.parameters()) - set(view.frozen_base.values())
    groups = []
    for group in optimizer.param_groups:
        groups.append([parameter for parameter in group["params"] if parameter in trained])
    rewrite_groups(view, optimizer, groups)

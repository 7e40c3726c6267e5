"""Take adapters off frozen networks that are no backbones of what trains, before the first optimizer step."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from lightning_lora.errors import StrategyError, listed
from lightning_lora.model.changes.freeze import freeze
from lightning_lora.model.still.find_still import about_networks_left_out
from lightning_lora.model.still.settle import strip_adapters
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.dicts import with_values, without
from lightning_lora.tensors.names import names_inside, names_outside
from lightning_lora.training.optimizers.edits import take_out
from lightning_lora.training.optimizers.group_checks import no_place_error
from lightning_lora.training.optimizers.groups import groups_of, held_by
from lightning_lora.training.steps.backbones import Backbones, Judged, WatchedNetwork


def strip_non_backbones(
    model: LightningModule, optimizer: Optimizer, strategy: Any, backbones: Backbones
) -> bool:
    """Before a step of ``optimizer``, remove the adapters of its networks that are no backbones.

    No optimizer has changed these adapters yet. All processes judge together. Return
    whether there were such networks. Refuse a backbone if no optimizer has a place for
    its adapters.
    """
    to_judge = _to_judge(optimizer, strategy.optimizers, backbones.unjudged)
    judged = backbones.judge(to_judge, strategy.reduce_boolean_decision)
    if judged.backbones:
        view = view_of(model)
        _check_places(view, judged.backbones, strategy.optimizers)
        _tell_of_backbones(view, judged)
    if judged.others:
        _strip(view_of(model), optimizer, judged.others)
    return bool(judged.others)


def refuse_non_backbones(
    model: LightningModule, strategy: Any, backbones: Backbones
) -> None:
    """Refuse networks that are no backbones: DeepSpeed's optimizer cannot lose their adapters."""
    judged = backbones.judge(list(backbones.unjudged), strategy.reduce_boolean_decision)
    if judged.backbones:
        _tell_of_backbones(view_of(model), judged)
    if judged.others:
        said = about_networks_left_out(judged.others, view_of(model).title)
        raise StrategyError(
            f"{said} DeepSpeed cannot take parameters out of a fit that has begun. "
            f"Name it yourself: exclude_modules={judged.others}."
        )


def _to_judge(
    optimizer: Optimizer,
    optimizers: Sequence[Optimizer],
    networks: Mapping[str, WatchedNetwork],
) -> list[str]:
    """The networks that an optimizer trains, or that none does."""
    held_here = held_by([optimizer])
    held_elsewhere = held_by(optimizers) - held_here
    found = []
    for name, network in networks.items():
        is_held_here = bool(network.parameters & held_here)
        is_held_elsewhere = bool(network.parameters & held_elsewhere)
        if is_held_here or not is_held_elsewhere:
            found.append(name)
    return found


def _check_places(
    view: View, backbones: Sequence[str], optimizers: Sequence[Optimizer]
) -> None:
    """Refuse backbones whose adapters no optimizer holds."""
    placed = with_values(view.adapter_parameters, held_by(optimizers))
    unplaced = names_inside(without(view.adapter_parameters, placed), backbones)
    if unplaced:
        raise no_place_error(view.title, unplaced, len(list(groups_of(optimizers))))


def _tell_of_backbones(view: View, judged: Judged) -> None:
    """Say that adapters train in a backbone too, if some train beside these networks."""
    beside = names_outside(view.layers, (*judged.backbones, *judged.others))
    if beside:
        rank_zero_info(
            f"Without LoRACallback, only a head of {view.title} would train. With it, "
            f"adapters train in {listed(judged.backbones)} too. To leave that as it "
            f"is: exclude_modules={judged.backbones}."
        )


def _strip(view: View, optimizer: Optimizer, networks: Sequence[str]) -> None:
    """Remove the adapters of networks, and take what trains no more out of the optimizer."""
    adapters = set(view.adapter_parameters.values())
    strip_adapters(view, networks)
    freeze(view)
    rank_zero_info(about_networks_left_out(networks, view.title))
    view = view_of(view.model)
    removed = adapters.difference(view.adapter_parameters.values())
    take_out(view, optimizer, removed.union(view.frozen_base.values()))

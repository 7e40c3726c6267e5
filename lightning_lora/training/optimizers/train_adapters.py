"""Make optimizers train the adapters instead of the base."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import listed
from lightning_lora.model.still.settle import settle
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.names import own_parameter
from lightning_lora.training.optimizers.edits import Edit, built_groups
from lightning_lora.training.optimizers.group_checks import check_emptied, check_rates, place_remaining
from lightning_lora.training.optimizers.groups import (
    Params,
    base_weights_of,
    layers_trained_by,
    leading_layers,
    parameters_in,
)
from lightning_lora.training.optimizers.scaled_groups import add_scaled_groups, remove_scaled_groups
from lightning_lora.training.optimizers.scales import LrScale, scaled_parameters


def train_adapters(model: nn.Module, optimizers: Sequence[Optimizer], lr_scale: LrScale = 1) -> None:
    """Replace base weights in the groups by adapters. Check all optimizers before the first is changed."""
    for optimizer in optimizers:
        remove_scaled_groups(optimizer)  # of an earlier fit: ``built_groups`` compares the others
    view = view_of(model)
    paused = _settle_networks(view, optimizers)
    scales = scaled_parameters(view, lr_scale)
    edits = place_remaining(view, _plan(view, optimizers), paused)
    for number, edit in enumerate(edits):
        check_emptied(view, number, edit)
        check_rates(edit, scales)
    for edit in edits:
        edit.write(view)
        add_scaled_groups(edit.optimizer, scales)


def _settle_networks(view: View, optimizers: Iterable[Optimizer]) -> list[str]:
    """Take adapters off networks that stand still. Return paused layers: what their adapters have learned stays."""
    unheld = _unheld(view, optimizers)
    paused = settle(view, unheld)
    if paused:
        rank_zero_info(
            f"The adapters of {listed(paused)} have learned. No optimizer holds them now: they do not train."
        )
    return paused


def _unheld(view: View, optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """If an adapted weight is held: the base's parameters that no optimizer holds, nor adapters of them.

    If none is held at all, the set is empty: that says nothing about single networks.
    """
    held = _built_by(optimizers)
    held |= base_weights_of(layers_trained_by(held, view), view)
    if held.isdisjoint(base_weights_of(view.layers, view)):
        return set()
    return set(view.base_parameters.values()) - held


def _built_by(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """The parameters in the groups as they were built."""
    held = set[nn.Parameter]()
    for optimizer in optimizers:
        held |= parameters_in(built_groups(optimizer))
    return held


def _plan(view: View, optimizers: Iterable[Optimizer]) -> list[Edit]:
    """The groups that each optimizer is to have. Their number stays."""
    places = _Places(_replacements(view), _built_by(optimizers))
    edits = []
    for optimizer in optimizers:
        built = built_groups(optimizer)
        edits.append(Edit(optimizer, built, places.in_groups(built)))
    return edits


def _replacements(view: View) -> dict[nn.Parameter, Params]:
    """The adapters' parameters that take the place of each weight in the optimizers."""
    replacements = defaultdict[nn.Parameter, Params](list)
    for layer in leading_layers(view).values():
        for name, about in layer.lora_specs().items():
            if about.role.trains:
                weight = own_parameter(layer, about.matrix.weight)
                replacements[weight].append(own_parameter(layer, name))
    return dict(replacements)


@dataclass(frozen=True)
class _Places:
    """Where adapters stand: in the group that the user has put them in, otherwise in that of their weight.

    If a weight is in two groups, its adapter is in the first. For example, where V and W are adapted, the groups
    ``[V], [W, bias]`` become ``[A and B of V], [A and B of W, bias]``, without the bias if that is frozen.
    """

    replacements: dict[nn.Parameter, Params]
    in_built_groups: set[nn.Parameter]

    def in_groups(self, groups: list[Params]) -> list[Params]:
        """Return one optimizer's groups with adapters. Files keep the order."""
        already_placed = set[nn.Parameter]()
        edited = []
        for group in groups:
            in_another_group = self.in_built_groups.difference(group)
            stands_elsewhere = already_placed | in_another_group
            trained = [p for p in self._may_train_in(group) if p not in stands_elsewhere]
            already_placed.update(trained)
            edited.append(trained)
        return edited

    def _may_train_in(self, group: Params) -> Iterable[nn.Parameter]:
        """What may train in one group, each once: adapters in their weights' places, and what is not frozen."""
        in_places_of_weights = parameters_in(map(self._replacements_of, group))
        found: dict[nn.Parameter, None] = {}
        for parameter in group:
            found.update(dict.fromkeys(self._replacements_of(parameter)))
            if parameter.requires_grad and parameter not in in_places_of_weights:
                found[parameter] = None
        return found

    def _replacements_of(self, weight: nn.Parameter) -> Params:
        """The adapters' parameters that take the place of a weight."""
        return self.replacements.get(weight, [])

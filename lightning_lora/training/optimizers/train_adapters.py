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
from lightning_lora.training.optimizers.group_checks import (
    check_emptied,
    check_rates,
    place_remaining,
)
from lightning_lora.training.optimizers.groups import (
    Params,
    base_weights_of,
    layers_trained_by,
    leading_layers,
    parameters_in,
)
from lightning_lora.training.optimizers.scaled_groups import (
    add_scaled_groups,
    remove_scaled_groups,
)
from lightning_lora.training.optimizers.scales import LrScale, scaled_parameters


def train_adapters(
    model: nn.Module, optimizers: Sequence[Optimizer], lr_scale: LrScale = 1
) -> None:
    """Replace base weights in the groups by adapters.

    1. Scaled groups that an earlier fit has left are removed: ``built_groups`` expects
       none.
    2. What the optimizers hold says which networks train: the others lose their
       adapters, or these are paused.
    3. The new groups are planned, and all of them are checked before the first
       optimizer is changed.
    4. They are written, and adapters with a scale get groups of their own.
    """
    for optimizer in optimizers:
        remove_scaled_groups(optimizer)
    view = view_of(model)
    paused = _settle_networks(view, optimizers)
    scales = scaled_parameters(view, lr_scale)
    edits = _plan(view, optimizers)
    place_remaining(view, edits, paused)
    for number, edit in enumerate(edits):
        check_emptied(view, number, edit)
        check_rates(edit, scales)
    for edit in edits:
        edit.write(view)
        add_scaled_groups(edit.optimizer, scales)


def _settle_networks(view: View, optimizers: Iterable[Optimizer]) -> list[str]:
    """Take adapters off networks that stand still, or pause those that have learned.

    Return the paused layers: their adapters do not train, and keep what they have
    learned.
    """
    paused = settle(view, _not_held(view, optimizers))
    if paused:
        rank_zero_info(
            f"The adapters of {listed(paused)} have learned. No optimizer holds them "
            "now: they do not train."
        )
    return paused


def _not_held(view: View, optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """The base's parameters that no optimizer holds, neither themselves nor by their adapters.

    Optimizers that hold no adapted weight at all say nothing of single networks: then
    the set is empty.
    """
    held = _in_built_groups(optimizers)
    held |= base_weights_of(layers_trained_by(held, view), view)
    adapted_weights = base_weights_of(view.layers, view)
    if held.isdisjoint(adapted_weights):
        return set()
    return set(view.base_parameters.values()) - held


def _in_built_groups(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """The parameters in the groups as the user's code has built them."""
    built = set[nn.Parameter]()
    for optimizer in optimizers:
        built |= parameters_in(built_groups(optimizer))
    return built


def _plan(view: View, optimizers: Iterable[Optimizer]) -> list[Edit]:
    """The groups that each optimizer is to have. The number of groups stays."""
    placement = _Placement(_replacements(view), _in_built_groups(optimizers))
    edits = []
    for optimizer in optimizers:
        built = built_groups(optimizer)
        edits.append(Edit(optimizer, built, placement.groups_with_adapters(built)))
    return edits


def _replacements(view: View) -> dict[nn.Parameter, Params]:
    """The adapters' parameters that take the place of each weight in the optimizers."""
    replacements = defaultdict[nn.Parameter, Params](list)
    for layer in leading_layers(view).values():
        for name, spec in layer.lora_specs().items():
            if spec.role.trains:
                weight = own_parameter(layer, spec.matrix.weight)
                replacements[weight].append(own_parameter(layer, name))
    return dict(replacements)


@dataclass(frozen=True)
class _Placement:
    """Which group each adapter comes into.

    - The one that the user's code has put it in.
    - Otherwise that of its weight. If a weight is in two groups of an optimizer, the
      first. If it is in two optimizers, both train its adapter, as they would the
      weight.

    For example, where V and W are adapted, the groups ``[V], [W, bias]`` become ``[A
    and B of V], [A and B of W, bias]``, without the bias if that is frozen. If a second
    optimizer has the groups ``[W], [W]``, these become ``[A and B of W], []``.
    """

    replacements: dict[nn.Parameter, Params]
    """The adapter's parameters of each adapted weight."""

    placed_by_user: set[nn.Parameter]
    """All parameters that the user's code has put into groups, also of other optimizers."""

    def groups_with_adapters(self, built: list[Params]) -> list[Params]:
        """Return one optimizer's groups, of what trains in them.

        Their order stays: files keep states by it.
        """
        in_earlier_groups = set[nn.Parameter]()
        groups = []
        for group in built:
            # earlier groups are those of this optimizer alone
            placed_elsewhere = self.placed_by_user.difference(group) | in_earlier_groups
            placed_here = [
                p for p in self._candidates(group) if p not in placed_elsewhere
            ]
            in_earlier_groups.update(placed_here)
            groups.append(placed_here)
        return groups

    def _candidates(self, group: Params) -> Iterable[nn.Parameter]:
        """What may train in a group: adapters in the places of their weights, and what is not frozen.

        Each comes once. An adapter that the user's code has put beside its weight comes in
        the weight's place.
        """
        of_weights_here = parameters_in(map(self._replacements_of, group))
        candidates: dict[nn.Parameter, None] = {}
        for parameter in group:
            candidates.update(dict.fromkeys(self._replacements_of(parameter)))
            if parameter.requires_grad and parameter not in of_weights_here:
                candidates[parameter] = None
        return candidates

    def _replacements_of(self, weight: nn.Parameter) -> Params:
        """The adapters' parameters that take the place of a weight."""
        return self.replacements.get(weight, [])

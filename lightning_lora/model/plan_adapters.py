"""What an injection will do to a model: which layers get adapters, and which lose theirs.

Nothing changes here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from lightning_lora.errors import TargetError
from lightning_lora.layers import LoRALayer
from lightning_lora.model.still.find_still import (
    about_networks_left_out,
    find_still_networks,
    parameters_frozen_by_user,
)
from lightning_lora.model.view import View
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.choice import Choice
from lightning_lora.targets.select import select
from lightning_lora.tensors.dicts import names_of_each, only, where, without
from lightning_lora.tensors.names import (
    direct_parameters,
    first_names,
    names_inside,
    names_outside,
    owner_of,
)


@dataclass(frozen=True)
class Plan:
    """Which adapters a model will have."""

    choices: dict[str, Choice]
    """All layers that will have an adapter, by name."""

    networks: StillNetworks
    """The networks that stand still. Some get no adapters, and those of copies follow others."""

    to_detach: list[str]
    """Adapted layers whose adapters are taken off first: they no longer fit, or nobody has asked for them."""

    to_attach: dict[str, Choice]
    """Those of the choices that get a new adapter: they have none, or theirs is taken off."""

    @property
    def changes_layers(self) -> bool:
        """Whether adapters come or go."""
        return bool(self.to_detach or self.to_attach)


def plan_adapters(view: View, *, from_file: bool) -> Plan:
    """Plan what the view's configuration asks for: all layers that it targets, but those in networks without adapters.

    A file's configuration excludes the networks that stood still in its training. So of
    these, only copies are looked for.
    """
    targeted = select(view.model, view.config)
    networks = find_still_networks(
        view,
        {name: choice.kind for name, choice in targeted.items()},
        parameters_frozen_by_user(view),
        no_others=from_file,
    )
    choices = only(targeted, names_outside(targeted, networks.without_adapters))
    if not choices:
        raise TargetError(
            f"{about_networks_left_out(networks.beside_training, view.title)} Nothing "
            f"else is targeted by {view.config.target_modules!r}: what trains has no "
            "layers of that kind."
        )
    to_detach = [
        *_resized_before_training(view),
        *_copied_or_left_out(view, choices, networks),
        *_tied_since(view, choices),
    ]
    get_new_adapter = not_adapted_yet(choices).keys() | set(to_detach)
    return Plan(choices, networks, to_detach, to_attach=only(choices, get_new_adapter))


def not_adapted_yet(choices: Mapping[str, Choice]) -> dict[str, Choice]:
    """Return those of the chosen layers that have no adapters."""
    return {
        name: choice
        for name, choice in choices.items()
        if not isinstance(choice.layer, LoRALayer)
    }


# Adapters to detach


def _resized_before_training(view: View) -> dict[str, LoRALayer]:
    """Adapted layers that have another size now, and whose adapters have learned nothing yet."""
    resized = where(view.layers, LoRALayer.lora_is_resized)
    return where(resized, LoRALayer.lora_is_fresh)


def _copied_or_left_out(
    view: View, choices: Mapping[str, Choice], networks: StillNetworks
) -> set[str]:
    """Adapted layers that nobody chose: other code copied them with their adapters, or their network gets none."""
    copied = without(view.layers, view.recorded_layers)
    left_out = names_inside(view.layers, networks.without_adapters)
    return {*copied, *left_out} - choices.keys()


def _tied_since(view: View, choices: Mapping[str, Choice]) -> list[str]:
    """Adapted layers that a word such as ``"all-linear"`` chose, and leaves out now: they were tied since.

    The word leaves out a head that is tied to an embedding. A module's own ``setup``
    may tie it only after the adapters came. An adapter that has learned is kept.
    """
    word = view.config.target_modules
    if word not in AUTOMATIC or not view.is_adapted:
        return []
    if view.adapter.config.target_modules != word:
        return []
    tied = _tied_parameters(view)
    fresh = where(without(view.layers, choices), LoRALayer.lora_is_fresh)
    return [name for name in fresh if not tied.isdisjoint(view.base_weights_of(name))]


def _tied_parameters(view: View) -> set[nn.Parameter]:
    """The parameters that several modules hold."""
    names_by_parameter = names_of_each(direct_parameters(first_names(view.modules)))
    tied = set[nn.Parameter]()
    for parameter, names in names_by_parameter.items():
        owners = {owner_of(name) for name in names}
        if len(owners) > 1:
            tied.add(parameter)
    return tied

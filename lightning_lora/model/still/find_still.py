"""Which networks of a model stand still, and so get no adapters, or follow others."""

from collections.abc import Collection, Mapping, Set
from functools import partial

from torch import nn

from lightning_lora.errors import listed
from lightning_lora.layers import LoRALayer, LoRAParameters, LoRATokens
from lightning_lora.model.untrained.find_untrained import find_untrained
from lightning_lora.model.view import View
from lightning_lora.networks.copies import find_copies
from lightning_lora.networks.find import find_networks
from lightning_lora.networks.still_networks import NO_NETWORKS, StillNetworks
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.find_names import find_names
from lightning_lora.targets.lookup import Lookup
from lightning_lora.tensors.dicts import only, where, where_not, with_values
from lightning_lora.tensors.names import modules_around, names_not_in

Kinds = Mapping[str, type]
"""Layers that are to have an adapter, each with the adapter's class: ``{"blocks.0.q": LoRALinear}``."""


def find_still_networks(
    view: View,
    kinds: Kinds,
    still_parameters: Set[nn.Parameter],
    *,
    no_others: bool = False,
) -> StillNetworks:
    """Return which networks get no adapter, and which follow another one.

    1. The record's networks without adapters stay so, unless the user has thawed some
       of them.
    2. Copies are looked for, and the record's copies are kept.
    3. Other networks are looked for, in the other layers. Those under a head are always
       looked for anew.

    Layers that the user names, and not a word such as ``"all-linear"``, always get an
    adapter. Then the third step is left out, as with ``no_others``, and copies must be
    exact.

    Args:
        view: The model, adapted or not.
        kinds: The layers that are targeted, with their adapter classes.
        still_parameters: Parameters of the base that stand still: frozen, or in no
            optimizer.
        no_others: Whether the third step is left out.
    """
    looks_for_others = not no_others and view.config.target_modules in AUTOMATIC
    recorded = view.adapter.networks if view.is_on_layers else NO_NETWORKS
    copies = find_copies(
        view.modules,
        view.base_parameters,
        kinds.keys(),
        still_parameters,
        may_be_smaller=looks_for_others,
    )
    networks = StillNetworks(
        beside_training=_not_thawed(view, recorded.beside_training),
        # a recorded copy is kept even if it trains now: ``settle``, which knows the
        # optimizers, takes it out
        copies={**_still_in_model(view, recorded.copies), **copies},
    )
    if looks_for_others and still_parameters:
        networks = _with_other_networks(view, networks, kinds, still_parameters)
    return networks.with_bare_layers(kinds.keys())


def _not_thawed(view: View, networks: tuple[str, ...]) -> tuple[str, ...]:
    """The networks in which the user lets nothing train."""
    if not networks:
        return ()
    user_trains = view.record.base.user_trains
    # a parameter that the record does not know is new: it trains
    thawed = [name for name in view.base_parameters if user_trains.get(name, True)]
    return tuple(names_not_in(networks, modules_around(thawed)))


def _still_in_model(view: View, copies: Mapping[str, str]) -> dict[str, str]:
    """The copies that are still modules of the model, and whose originals are too."""
    return with_values(only(copies, view.modules), view.modules)


def _with_other_networks(
    view: View, known: StillNetworks, kinds: Kinds, still_parameters: Set[nn.Parameter]
) -> StillNetworks:
    """The known networks, and those that are found in layers outside them.

    Weights below adapters that have learned count as training, whatever stands still:
    so no such adapter is lost.
    """
    return find_networks(
        view.modules,
        view.base_parameters,
        _whole_layers(kinds),
        still_parameters - _weights_that_have_learned(view),
        known=known,
        named_by_user=_named_by_user(view),
        find_untrained=partial(_find_new_modules, view),
    )


def _find_new_modules(view: View) -> tuple[str, ...]:
    """The modules that look new in a trained model. This reads weights."""
    return find_untrained(view).new_modules


def _whole_layers(kinds: Kinds) -> set[str]:
    """The layers that are adapted as a whole: not single parameters or rows, which the user has named."""
    return set(where(kinds, _adapts_whole_layers))


def _adapts_whole_layers(kind: type) -> bool:
    return not issubclass(kind, LoRAParameters | LoRATokens)


def _weights_that_have_learned(view: View) -> set[nn.Parameter]:
    """The weights below adapters that have learned."""
    weights: set[nn.Parameter] = set()
    for name in layers_that_have_learned(view):
        weights |= view.base_weights_of(name)
    return weights


def layers_that_have_learned(view: View) -> dict[str, LoRALayer]:
    """Return the layers whose updates are not zero."""
    return where_not(view.layers, LoRALayer.lora_is_fresh)


def _named_by_user(view: View) -> list[str]:
    """What the user has left out, or trains in full."""
    lookup = Lookup(view.model)
    config = view.config_of_user
    left_out = find_names(lookup, "exclude_modules", config.exclude_modules)
    saved = find_names(lookup, "modules_to_save", config.modules_to_save)
    return [*left_out, *saved]


# What callers need besides: the user's frozen parameters, and a message


def parameters_frozen_by_user(view: View) -> set[nn.Parameter]:
    """Return the parameters that the user froze: they stand still, whatever the optimizers hold."""
    return set(only(view.base_parameters, view.frozen_by_user).values())


def about_networks_left_out(networks: Collection[str], title: str) -> str:
    """Return what is said of networks that get no adapters."""
    return (
        f"No adapter for {listed(networks)} of {title}: it is frozen, or in no "
        "optimizer, and other networks train beside it. So it stays as it is. To adapt "
        "it too, let it train, or name its layers in target_modules."
    )

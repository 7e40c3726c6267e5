"""Which networks of a model stand still, and so get no adapters, or follow others."""

from collections.abc import Collection, Mapping, Set
from dataclasses import replace

from torch import nn

from lightning_lora.errors import listed
from lightning_lora.layers import LoRALayer, LoRAParameters, LoRATokens
from lightning_lora.model.untrained.find_untrained import find_untrained
from lightning_lora.model.view import View
from lightning_lora.networks.copies import find_copies
from lightning_lora.networks.find import find_networks
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.targets.arguments import AUTOMATIC
from lightning_lora.targets.lookup import Lookup
from lightning_lora.tensors.dicts import only, where, where_not, with_values
from lightning_lora.tensors.names import modules_around, names_not_in, names_outside


def find_still_networks(
    view: View, kinds: Mapping[str, type], still_parameters: Set[nn.Parameter]
) -> StillNetworks:
    """Return which networks get no adapter, and which follow another one.

    Layers that the user names always get an adapter, and one that has learned is kept.
    So networks are looked for only where a word such as ``"all-linear"`` has chosen the
    layers.

    Args:
        view: The model, adapted or not.
        kinds: The adapter class of each layer that is targeted.
        still_parameters: Parameters of the base that stand still: frozen, or in no
            optimizer.
    """
    if view.config.target_modules not in AUTOMATIC:
        return known_still_networks(view, kinds, still_parameters)
    known = _known_networks(view, kinds, still_parameters, copies_may_be_smaller=True)
    if still_parameters:
        known = _with_networks_found(view, known, kinds, still_parameters)
    return known.with_bare_layers(kinds.keys())


def known_still_networks(
    view: View, kinds: Mapping[str, type], still_parameters: Set[nn.Parameter]
) -> StillNetworks:
    """Return which networks get no adapter as before, and which are exact copies.

    No other network is looked for.
    """
    return _known_networks(
        view, kinds, still_parameters, copies_may_be_smaller=False
    ).with_bare_layers(kinds.keys())


def _known_networks(
    view: View,
    kinds: Mapping[str, type],
    still_parameters: Set[nn.Parameter],
    *,
    copies_may_be_smaller: bool,
) -> StillNetworks:
    """The networks of before that still stand still, and all copies.

    With ``copies_may_be_smaller``, a copy may lack some of its original's weights. An
    earlier copy is kept even if it trains now: ``settle`` takes such copies out.
    """
    before = view.adapter.networks if view.is_on_layers else StillNetworks()
    copies = _copies_as_before(view, before)
    copies |= find_copies(
        view.modules,
        view.base_parameters,
        kinds.keys(),
        still_parameters,
        may_lack=copies_may_be_smaller,
    )
    return StillNetworks(beside_training=_still_as_before(view, before), copies=copies)


def _with_networks_found(
    view: View,
    known: StillNetworks,
    kinds: Mapping[str, type],
    still_parameters: Set[nn.Parameter],
) -> StillNetworks:
    """The known networks, and those that are found in the layers outside them."""

    # reads weights: it is called only if it is needed
    def find_new_modules() -> tuple[str, ...]:
        return find_untrained(view).new_modules

    layers = names_outside(_whole_layers(kinds), known.beside_training)
    found = find_networks(
        view.modules,
        view.base_parameters,
        set(layers),
        still_parameters - _weights_that_have_learned(view),
        named_by_user=_named_by_user(view),
        copies=known.copies,
        find_untrained=find_new_modules,
    )
    return replace(
        found, beside_training=(*known.beside_training, *found.beside_training)
    )


def _copies_as_before(view: View, before: StillNetworks) -> dict[str, str]:
    """The earlier copies that are still in the model, with their originals."""
    present_copies = only(before.copies, view.modules)
    return with_values(present_copies, view.modules)


def _still_as_before(view: View, before: StillNetworks) -> tuple[str, ...]:
    """Networks that stood still, and in which the user has thawed nothing since."""
    if not before.beside_training:
        return ()
    user_trains = view.record.base.user_trains
    thawed = [name for name in view.base_parameters if user_trains.get(name, True)]
    return tuple(names_not_in(before.beside_training, modules_around(thawed)))


def _whole_layers(kinds: Mapping[str, type]) -> list[str]:
    """The layers that are adapted as a whole: not single parameters or rows, which the user has named."""
    return list(where(kinds, _adapts_whole_layers))


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
    left_out = lookup.find("exclude_modules", view.config.exclude_modules)
    saved = lookup.find("modules_to_save", view.config.modules_to_save)
    return [*left_out, *saved]


# For callers


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

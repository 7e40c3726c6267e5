"""Which networks of a model get adapters: those that train, and copies of these, which follow them."""

from collections.abc import Collection, Mapping, Set
from dataclasses import replace

from torch import nn

from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import LoRALayer, LoRAParameters, LoRATokens
from lightning_lora.model import attach
from lightning_lora.model.fresh import find_fresh
from lightning_lora.model.view import View
from lightning_lora.moments import Guards
from lightning_lora.networks.copies import find_copies
from lightning_lora.networks.find import find_networks
from lightning_lora.networks.roles import StillNetworks
from lightning_lora.targets.lookup import AUTOMATIC, Names
from lightning_lora.tensors.named import (
    inside,
    modules_around,
    not_in,
    only,
    outside,
    where,
    where_not,
    with_values,
    without,
)
from lightning_lora.tensors.names import owner_of


def left_still(still: Collection[str], title: str) -> str:
    """Return what is said of networks that get no adapters."""
    return (
        f"No adapter for {listed(still)} of {title}: it is frozen, or in no optimizer, and other networks train beside "
        "it. So it stays as it is. To adapt it too, let it train, or name its layers in target_modules."
    )


def networks_of(
    view: View, kinds: Mapping[str, type], still: Set[nn.Parameter], *, is_from_file: bool = False
) -> StillNetworks:
    """Return what layers are for. Who names a layer wants an adapter there, and an adapter that has learned stays.

    Args:
        view: The model, adapted or not.
        kinds: The adapter class of each layer that is targeted.
        still: Parameters of the base that stand still: frozen, or in no optimizer.
        is_from_file: Whether the configuration is a file's, which names the networks that stand still.
    """
    layers_are_chosen_by_us = view.config.target_modules in AUTOMATIC and not is_from_file
    before = view.adapter.networks if view.is_on_layers else StillNetworks()
    copies = _copies_that_are_left(view, before)  # if none of them trains now
    copies |= find_copies(view.modules, view.base, kinds.keys(), still, may_lack=layers_are_chosen_by_us)
    networks = StillNetworks(beside_training=_still_as_before(view, before), copies=copies)
    if still and layers_are_chosen_by_us:
        networks = _with_networks_found(view, networks, kinds, still)
    return networks.with_bare_layers(kinds.keys())


def _with_networks_found(
    view: View, networks: StillNetworks, kinds: Mapping[str, type], still: Set[nn.Parameter]
) -> StillNetworks:
    """These networks, and those that are found to stand still."""
    found = find_networks(
        view.modules,
        view.base,
        set(outside(_whole_layers(kinds), networks.beside_training)),
        still - _weights_that_have_learned(view),
        named=_named_by_user(view),
        copies=networks.copies,
        untrained=lambda: find_fresh(view).new,
    )
    return replace(found, beside_training=(*networks.beside_training, *found.beside_training))


def _copies_that_are_left(view: View, before: StillNetworks) -> dict[str, str]:
    """The earlier copies that the model still has, with their originals."""
    present_copies = only(before.copies, view.modules)
    return with_values(present_copies, view.modules)


def _still_as_before(view: View, before: StillNetworks) -> tuple[str, ...]:
    """Networks that stood still, and in which the user has thawed nothing since."""
    if not before.beside_training:
        return ()
    requires_grad = view.record.base.required_grad
    thawed = [name for name in view.base if requires_grad.get(name, True)]
    return tuple(not_in(before.beside_training, modules_around(thawed)))


def _whole_layers(kinds: Mapping[str, type]) -> list[str]:
    """The layers that are adapted as a whole: not single parameters or rows, which the user has named."""
    return list(where(kinds, _adapts_whole_layers))


def _adapts_whole_layers(kind: type) -> bool:
    return not issubclass(kind, LoRAParameters | LoRATokens)


def _weights_that_have_learned(view: View) -> set[nn.Parameter]:
    """The weights below adapters that have learned."""
    weights: set[nn.Parameter] = set()
    for name in layers_that_have_learned(view):
        weights |= view.weights_of(name)
    return weights


def layers_that_have_learned(view: View) -> dict[str, LoRALayer]:
    """Return the layers whose updates are not zero."""
    return where_not(view.layers, LoRALayer.lora_is_fresh)


def _named_by_user(view: View) -> list[str]:
    """What the user has left out, or trains in full."""
    names = Names(view.model)
    left_out = names.find("exclude_modules", view.config.exclude_modules)
    saved = names.find("modules_to_save", view.config.modules_to_save)
    return [*left_out, *saved]


# When the optimizers are known


def settle(view: View, unheld: Set[nn.Parameter]) -> list[str]:
    """Find networks that stand still: frozen, or in no optimizer (``unheld``), and remove their adapters.

    Return layers whose adapters have learned: these stay, and are paused.
    """
    frozen_by_user = set(only(view.base, view.frozen_by_user).values())
    still = unheld | frozen_by_user
    found = networks_of(view, _kinds_that_train(view), still)
    copies = _copies_that_stand_still(view, found, still)

    paused = _pause_layers(view, unheld, copies)
    _resume_layers(view, paused, copies)
    Guards().networks_settled(view, paused, view.record.base.frozen_since)
    view.record.base.forget_frozen_since()

    before = view.adapter.networks
    under_head = tuple(dict.fromkeys((*before.under_head, *found.under_head)))
    view.adapter.networks = replace(before, under_head=under_head, copies=copies)
    leave_alone(view, found.beside_training)
    view.look_again()
    attach.freeze(view)  # what trains in full does not in a copy
    follow_originals(view)
    return paused


def _kinds_that_train(view: View) -> dict[str, type]:
    """The adapter classes of the layers that train by themselves: not of copies, nor of what is paused."""
    kinds: dict[str, type] = {}
    for name, layer in view.layers.items():
        if not layer.lora_settings.follows:
            kinds[name] = layer.overlaid[0]
    return kinds


def _copies_that_stand_still(view: View, found: StillNetworks, still: Set[nn.Parameter]) -> dict[str, str]:
    """The copies in which nothing trains by itself."""
    required_grad = view.record.base.required_grad
    training = [name for name, p in view.base.items() if required_grad.get(name) and p not in still]
    return without(found.copies, modules_around(training))


def _pause_layers(view: View, unheld: Set[nn.Parameter], copies: Mapping[str, str]) -> list[str]:
    """Pause adapters that have learned, if no optimizer holds them or their weights. Return their layers."""
    expected = {*view.adapter.networks.under_head, *copies}  # to have weights that no optimizer holds
    paused = []
    for name in outside(view.layers, expected):
        layer = view.layers[name]
        if view.weights_of(name) <= unheld and not layer.lora_is_fresh():
            layer.lora_pause()
            paused.append(name)
    return paused


def _resume_layers(view: View, paused: Collection[str], copies: Mapping[str, str]) -> None:
    """Let adapters train again that were paused in an earlier fit, or followed a network that is no copy now."""
    standing_still = {*paused, *inside(view.layers, copies)}
    for layer in without(view.layers, standing_still).values():
        if layer.lora_settings.follows:
            layer.lora_train_again()


def leave_alone(view: View, still: Collection[str]) -> None:
    """Remove the adapters of networks. Files say that they are left out."""
    before = view.adapter.networks
    under_head = tuple(not_in(before.under_head, still))
    now = replace(before, beside_training=(*before.beside_training, *still), under_head=under_head)
    now = now.with_bare_layers(view.layers.keys())
    left = inside(view.layers, now.without_adapters)
    if not left:
        return
    if len(left) == len(view.layers):
        raise TargetError(f"{left_still(still, view.title)} No other layer has an adapter.")
    attach.detach_from(view, left)
    view.adapter.layers = tuple(view.layers)
    view.adapter.networks = now
    attach.freeze(view)


# Copies, which other code moves after their originals


def follow_copied(view: View, idle: Set[str]) -> None:
    """Let those of these layers that copy a network with others follow it."""
    before = view.adapter.networks
    view.adapter.networks = replace(before, copies={**before.copies, **copies_among(view, idle)})
    follow_originals(view)


def begin_alike(view: View, idle: Set[str]) -> dict[str, str]:
    """Return networks of these layers that copy others. If their updates are zero, they begin with the same adapters.

    A momentum copy that nobody froze then follows its original, if other code moves it. A copy that an optimizer trains
    later, such as an expert, trains by itself.
    """
    copies = copies_among(view, idle)
    networks = StillNetworks(copies=copies)
    originals = _original_layers(view, networks)
    for name, layer in only(view.layers, idle & originals.keys()).items():
        layer.lora_begin_as(originals[name])
    return copies


def copies_among(view: View, idle: Set[str]) -> dict[str, str]:
    """Return networks of these layers that copy one with other layers."""
    if not idle:
        return {}
    busy = modules_around(without(view.layers, idle))
    still = {parameter for name, parameter in view.base.items() if owner_of(name) not in busy}
    return find_copies(view.modules, view.base, view.layers.keys(), still)


def follow_originals(view: View) -> None:
    """Let the adapters of copies follow those of their originals. Before they train, both have the same values."""
    originals = _original_layers(view, view.adapter.networks)
    for name, original in originals.items():
        view.layers[name].lora_follow(original)
    if view.adapter.is_trained:
        return
    for layer in without(view.layers, originals).values():
        if layer.lora_settings.follows and layer.lora_is_fresh():  # one that has learned may be paused
            layer.lora_train_again()


def _original_layers(view: View, networks: StillNetworks) -> dict[str, LoRALayer]:
    """The adapted layers that layers of copies follow, by the names of these."""
    originals = networks.originals_of(view.layers)
    adapted = with_values(originals, view.layers)
    return {name: view.layers[original] for name, original in adapted.items()}

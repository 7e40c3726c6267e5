"""Which networks of a model get adapters: those that train, and copies of these, which follow them."""

from collections.abc import Collection, Mapping, Set
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_lora.errors import TargetError, listed
from lightning_lora.layers import LoRALayer, LoRAParameters, LoRATokens
from lightning_lora.model import attach
from lightning_lora.model.fresh import find_fresh
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guards
from lightning_lora.networks.copies import find_copies
from lightning_lora.networks.find import find_networks
from lightning_lora.networks.roles import Networks
from lightning_lora.targets.lookup import AUTOMATIC, Names
from lightning_lora.tensors.named import among, inside, modules_around, only, outside, where, without
from lightning_lora.tensors.names import is_in_any, owner_of


def left_still(still: Collection[str], title: str) -> str:
    """Return what is said of networks that get no adapters."""
    return (
        f"No adapter for {listed(still)} of {title}: it is frozen, or in no optimizer, and other networks train beside "
        "it. So it stays as it is. To adapt it too, let it train, or name its layers in target_modules."
    )


def networks_of(view: View, kinds: Mapping[str, Any], still: Set[nn.Parameter], *, finds: bool = True) -> Networks:
    """Return what layers are for. Who names a layer wants an adapter there, and an adapter that has learned stays.

    Args:
        view: The model, adapted or not.
        kinds: The adapter class of each layer that is targeted.
        still: Parameters of the base that stand still: frozen, or in no optimizer.
        finds: Whether networks that stand still are looked for. Otherwise, the configuration names them.
    """
    finds = finds and view.config.target_modules in AUTOMATIC
    known = Networks()
    if view.is_adapted and not view.is_merged:
        known = view.adapter.networks
    copies = {
        **_copies_that_are_left(view, known),  # if none of them trains now
        **find_copies(view.modules, view.base, kinds.keys(), still, may_lack=finds),
    }
    stays = _still_as_before(view, known)
    if not still or not finds:
        return Networks(still=stays, copies=copies).fitting(kinds.keys())
    found = find_networks(
        view.modules,
        view.base,
        set(outside(_whole_layers(kinds), stays)),
        still - _weights_that_have_learned(view),
        beside=_named_beside(view),
        copies=copies,
        untrained=lambda: find_fresh(view).new,
    )
    return replace(found, still=(*stays, *found.still)).fitting(kinds.keys())


def _copies_that_are_left(view: View, known: Networks) -> dict[str, str]:
    copies = only(known.copies, view.modules)
    return among(copies, view.modules)


def _still_as_before(view: View, known: Networks) -> tuple[str, ...]:
    """Networks that stood still, and in which the user has thawed nothing since."""
    if not known.still:
        return ()
    flags = view.record.base.flags_before()
    frozen_before = without(flags, where(flags, bool))
    thawed = without(view.base, frozen_before)
    return tuple(network for network in known.still if not inside(thawed, [network]))


def _whole_layers(kinds: Mapping[str, Any]) -> list[str]:
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
    return without(view.layers, where(view.layers, LoRALayer.lora_is_fresh))


def _named_beside(view: View) -> list[str]:
    """What the user has left out, or trains in full."""
    names = Names(view.model)
    left_out = names.find("exclude_modules", view.config.exclude_modules)
    saved = names.find("modules_to_save", view.config.modules_to_save)
    return [*left_out, *saved]


# When the optimizers are known


def settle(model: nn.Module, unheld: Set[nn.Parameter]) -> list[str]:
    """Find networks that stand still: frozen, or in no optimizer (``unheld``), and remove their adapters.

    Return layers whose adapters have learned: these stay, and do not train.
    """
    view = view_of(model)
    still = unheld | set(only(view.base, view.frozen_by_user).values())
    kinds = {name: layer.overlaid[0] for name, layer in view.layers.items() if not layer.lora_settings.follows}
    found = networks_of(view, kinds, still)
    known = view.adapter.networks
    copies = _copies_that_stand_still(view, found, still)
    rests = _let_rest(view, unheld, known.below, copies)
    Guards().networks_settled(view, rests, view.record.base.frozen_since)
    view.record.base.forget_frozen_since()
    below = tuple(dict.fromkeys((*known.below, *found.below)))
    view.adapter.networks = replace(known, below=below, copies=copies)
    leave_alone(model, found.still)
    attach.freeze(view_of(model))  # what trains in full does not in a copy
    follow_originals(view_of(model))
    return rests


def _copies_that_stand_still(view: View, found: Networks, still: Set[nn.Parameter]) -> dict[str, str]:
    """The copies in which nothing trains by itself."""
    trained_before = where(view.record.base.flags_before(), bool)
    training = without(only(view.base, trained_before), among(view.base, still))
    return {copy: original for copy, original in found.copies.items() if not inside(training, [copy])}


def _let_rest(view: View, unheld: Set[nn.Parameter], below: Collection[str], copies: Mapping[str, str]) -> list[str]:
    """Let adapters that have learned rest if no optimizer holds them or their weights. Return their layers."""
    rests = []
    for name, layer in view.layers.items():
        is_held = not view.weights_of(name) <= unheld
        has_a_place = is_held or is_in_any(name, below) or is_in_any(name, copies)
        if not has_a_place and not layer.lora_is_fresh():
            rests.append(name)
            layer.lora_follow(layer)  # itself: it keeps what it has learned
        elif layer.lora_settings.follows and not is_in_any(name, copies):
            layer.lora_follow(None)
    return rests


def leave_alone(model: nn.Module, still: Collection[str]) -> None:
    """Remove the adapters of networks. Files say that they are left out."""
    view = view_of(model)
    known = view.adapter.networks
    below = tuple(without(dict.fromkeys(known.below), still))
    now = replace(known, still=(*known.still, *still), below=below).fitting(view.layers.keys())
    left = inside(view.layers, now.left)
    if not left:
        return
    if len(left) == len(view.layers):
        raise TargetError(f"{left_still(still, view.title)} No other layer has an adapter.")
    attach.detach_adapters(view, left)
    view.adapter.layers = tuple(view.layers)
    view.adapter.networks = now
    attach.freeze(view)


# Copies, which other code moves after their originals


def follow_copied(view: View, idle: Set[str]) -> None:
    """Let those of these layers that copy a network with others follow it."""
    known = view.adapter.networks
    view.adapter.networks = replace(known, copies={**known.copies, **copies_among(view, idle)})
    follow_originals(view)


def begin_alike(view: View, idle: Set[str]) -> dict[str, str]:
    """Return networks of these layers that copy others. If their updates are zero, they begin with the same adapters.

    A momentum copy that nobody froze then follows, if other code moves it. One that trains later, as an expert, does.
    """
    copies = copies_among(view, idle)
    networks = Networks(copies=copies)
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
    for name, layer in view.layers.items():
        may_learn_itself = not view.adapter.is_trained and layer.lora_is_fresh()  # one that has learned may rest
        if name in originals or (layer.lora_settings.follows and may_learn_itself):
            layer.lora_follow(originals.get(name))


def _original_layers(view: View, networks: Networks) -> dict[str, LoRALayer]:
    """The adapted layers that layers of copies follow, by the names of these."""
    originals = networks.originals_of(view.layers)
    adapted = among(originals, view.layers)
    return {name: view.layers[original] for name, original in adapted.items()}

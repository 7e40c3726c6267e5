"""Once the optimizers are known: networks that stand still lose their adapters, and layers are paused or resumed."""

from collections.abc import Collection, Mapping, Set
from dataclasses import replace

from torch import nn

from lightning_lora.errors import TargetError
from lightning_lora.model.changes.attach import detach_from
from lightning_lora.model.changes.freeze import freeze
from lightning_lora.model.still.find_still import (
    about_networks_left_out,
    find_still_networks,
    parameters_frozen_by_user,
)
from lightning_lora.model.still.follow import follow_originals
from lightning_lora.model.view import View
from lightning_lora.moments import Guard, Guards
from lightning_lora.networks.still_networks import StillNetworks
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import (
    is_in_any,
    modules_around,
    names_inside,
    names_outside,
)


def settle(view: View, unheld: Set[nn.Parameter]) -> list[str]:
    """Remove, pause or resume adapters, now that the optimizers are known.

    No optimizer holds the parameters in ``unheld``. In this order:

    1. The networks that stand still are found: frozen, or in no optimizer.
    2. Adapters that have learned, and that no optimizer trains, are paused. All others
       train, also those that an earlier fit has paused. The record still says which
       networks an earlier fit found under a head: their adapters train although no
       optimizer holds their weights.
    3. Guards are told.
    4. The networks are noted. What trains in full depends on them.
    5. Networks beside others that train lose their adapters, none of which has learned.
    6. The base is frozen anew, and adapters of copies follow those of their originals.

    Return the layers whose adapters are paused.
    """
    still_parameters = unheld | parameters_frozen_by_user(view)
    found = find_still_networks(view, _kinds_that_train(view), still_parameters)
    found = _without_copies_that_train(view, found, still_parameters)
    paused = _pause_or_resume_layers(view, unheld, found.copies)
    _tell_guards_and_forget_frozen(view, paused)
    _note_networks(view, found)
    strip_adapters(view, found.beside_training)
    # nothing trains in a copy now, not even its modules_to_save and biases
    freeze(view)
    follow_originals(view)
    return paused


def _kinds_that_train(view: View) -> dict[str, type]:
    """The layers whose adapters train by themselves, with their classes: not of copies, nor of what is paused."""
    kinds: dict[str, type] = {}
    for name, layer in view.layers.items():
        if layer.lora_settings.trains:
            kinds[name] = layer.lora_kind
    return kinds


def _without_copies_that_train(
    view: View, found: StillNetworks, still_parameters: Set[nn.Parameter]
) -> StillNetworks:
    """The networks found, but no copies in which something trains: these follow nothing now."""
    user_trains = view.record.base.user_trains
    training = []
    for name, parameter in view.base_parameters.items():
        if user_trains.get(name) and parameter not in still_parameters:
            training.append(name)
    return replace(found, copies=without(found.copies, modules_around(training)))


def _pause_or_resume_layers(
    view: View, unheld: Set[nn.Parameter], copies: Mapping[str, str]
) -> list[str]:
    """Pause adapters that have learned, if no optimizer holds their weights. Let all others train, but for copies.

    Return the paused layers. Adapters under a head train although no optimizer holds
    their weights. Those that train again were paused in an earlier fit, or followed a
    network that is no copy now.
    """
    # an earlier fit has found these: no adapter in a network found now has learned
    under_head = view.adapter.networks.under_head
    paused = []
    for name in names_outside(view.layers, copies):
        layer = view.layers[name]
        may_be_unheld = is_in_any(name, under_head)
        is_unheld = view.base_weights_of(name) <= unheld
        if is_unheld and not may_be_unheld and not layer.lora_is_fresh():
            layer.lora_pause()
            paused.append(name)
        elif not layer.lora_settings.trains:
            layer.lora_train_again()
    return paused


def _tell_guards_and_forget_frozen(view: View, paused: list[str]) -> None:
    """Tell guards what is paused, and once, what the user has frozen since adapters learned."""
    base = view.record.base
    Guards().tell(Guard.networks_settled, view, paused, base.frozen_since)
    base.forget_frozen_since()


def _note_networks(view: View, found: StillNetworks) -> None:
    """Note the networks that keep adapters: those found under a head, besides earlier ones, and the copies found."""
    with_earlier = view.adapter.networks.with_under_head(found.under_head)
    view.adapter.networks = replace(with_earlier, copies=found.copies)
    view.look_again()  # what trains in full depends on the networks


def strip_adapters(view: View, networks: Collection[str]) -> None:
    """Remove the adapters of networks, and of the layers of copies that lose their originals so.

    Files say that they are left out. Callers ``freeze`` afterwards: nothing trains in
    full there any more. An error, if no adapter would be left, changes nothing.
    """
    with_more = view.adapter.networks.with_beside_training(networks)
    now = with_more.with_bare_layers(view.layers.keys())
    to_strip = names_inside(view.layers, now.without_adapters)
    if not to_strip:
        return
    if len(to_strip) == len(view.layers):
        about = about_networks_left_out(networks, view.title)
        raise TargetError(f"{about} No other layer has an adapter.")
    detach_from(view, to_strip)
    view.adapter.layers = tuple(view.layers)
    view.adapter.networks = now
    view.look_again()  # what trains in full depends on the networks

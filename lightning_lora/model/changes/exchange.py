"""Exchange the adapter on a model's layers for another one on the same base."""

import torch
from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState, Kept
from lightning_lora.base.states import SWITCH
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import ADAPTERS, adapter_for, is_resized
from lightning_lora.layers.norms import freeze_norms, set_frozen
from lightning_lora.model.base_values import tensors_with_originals
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.changes.attach import (
    attach_adapters,
    detach_adapters,
    update_for_changed_weights,
)
from lightning_lora.model.changes.off_layers import convert_to_layer, move_to
from lightning_lora.model.changes.show_base import show_adapter
from lightning_lora.model.start_call import start_call
from lightning_lora.model.view import View, refuse_lost_adapters
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import (
    names_joined,
    names_not_in,
    set_tensor,
    with_all_inside,
)
from lightning_lora.tensors.undo import Undo


@torch.inference_mode(False)
@torch.no_grad()
def exchange(view: View, coming: AdapterState) -> None:
    """Take the active adapter off, and put another one on: an inactive one, or a new one that has no layers yet.

    The active adapter leaves, and the other one comes. All that can fail is done before
    the first change of the model: until then, only the coming adapter is changed, which
    is on no layer.
    """
    prepare_for_model(view, coming)
    tensors_to_put = _tensors_to_put(view, coming)  # copies need memory
    refuse_lost_adapters(view)

    # the first change. The leaving adapter keeps its tensors (head.weight, if it trained
    # the head), and they must hold its own values, not the base's that are shown
    if view.record.state.shows_base:
        show_adapter(view)
    leaving = Kept(
        tensors=tensors_with_originals(view), layer_adapters=detach_adapters(view)
    )

    # each of the coming adapter's parameters has kept its requires_grad, and those with
    # the base's values are frozen
    for name, tensor in tensors_to_put.items():
        set_tensor(view.model, name, tensor)
    attach_adapters(view, coming.kept.layer_adapters)
    view.record.note_exchanged(leaving, coming)

    # from here on, the view shows the coming adapter, which may train other modules in
    # full than the one that left
    view.look_again()
    _freeze_other_norms(view)
    update_for_changed_weights(view)


def _freeze_other_norms(view: View) -> None:
    """Freeze all norms but those in modules that the active adapter trains in full."""
    for module in with_all_inside(view.saved_modules):
        set_frozen(module, False)
    freeze_norms(view.modules.values(), view.saved_modules)


def _tensors_to_put(view: View, coming: AdapterState) -> dict[str, Tensor]:
    """The tensors that take the place of the active adapter's, by name.

    They are the coming adapter's own, such as its trained ``head.weight``. Where only
    the active adapter has trained a tensor, a new one with the base's values is put.
    """
    to_put = dict(coming.kept.tensors)
    originals = view.adapter.originals
    trained_by_active_alone = without(tensors_with_originals(view), to_put)
    # one new tensor for each old one: a tied tensor has several names
    bases = dict[Tensor, Tensor]()
    for name, tensor in trained_by_active_alone.items():
        if tensor not in bases:
            bases[tensor] = _base_of(tensor, originals[name])
        to_put[name] = bases[tensor]
    return to_put


def _base_of(tensor: Tensor, original: Tensor) -> Tensor:
    """A new tensor like ``tensor``, with the values that the base has in its place."""
    if original.is_meta:  # the model was adapted before it had values
        return tensor
    value = original.to(tensor, copy=True)
    is_buffer = not isinstance(tensor, nn.Parameter)
    return value if is_buffer else nn.Parameter(value, requires_grad=False)


# The adapter that comes


def check_switchable(view: View) -> None:
    """Refuse to exchange adapters that are in merged weights or in shards."""
    # for its refusal: the rule of a switch (base/states.py) allows no merged model
    start_call(view.model, SWITCH)
    if view.is_sharded:
        raise AdapterStateError(
            f"The parameters of {view.title} are sharded over processes, where only "
            "set_adapter(model, None) is possible. Switch before the model is sharded."
        )


def prepare_for_model(view: View, state: AdapterState) -> None:
    """Fit an inactive adapter to its layers, which may have been moved, converted or quantised since.

    Layers that it does not fit any more are refused.
    """
    check_switchable(view)
    refuse_computed_weights(view)
    _check_still_there(view, state)
    _update_kinds(view, state)
    _check_not_resized(view, state)
    with torch.inference_mode(False), torch.no_grad(), Undo() as undo:
        for name, tensor in state.kept.tensors.items():
            move_to(tensor, view.tensors[name].device, view.tensors[name].dtype)
        for name, adapter in state.kept.layer_adapters.items():
            convert_to_layer(view.modules[name], adapter, undo)
        undo.keep()


def _check_still_there(view: View, state: AdapterState) -> None:
    """Refuse a model that has lost what an inactive adapter is for."""
    needed = list(state.kept.tensors)
    for name, adapter in state.kept.layer_adapters.items():
        needed += names_joined(name, adapter.weights)
    absent = names_not_in(dict.fromkeys(needed), view.tensors)
    if absent:
        raise AdapterStateError(
            f"{view.title} no longer has {listed(absent)}, for which the adapter "
            f"{state.name!r} is. Give the model its layers back, or call "
            f"remove_adapters(model, {state.name!r})."
        )


def _update_kinds(view: View, state: AdapterState) -> None:
    """Give an inactive adapter the classes that fit its layers now: these may have been quantised since."""
    for name, adapter in state.kept.layer_adapters.items():
        # a kind such as LoRATokens, which is not chosen by the type of the layer, stays
        if adapter.kind in ADAPTERS.values():
            adapter.kind = adapter_for(view.modules[name]) or adapter.kind


def _check_not_resized(view: View, state: AdapterState) -> None:
    """Refuse layers that were resized while an adapter of theirs was not active."""
    resized = []
    for name, adapter in state.kept.layer_adapters.items():
        if is_resized(view.modules[name], adapter.kind, adapter.matrices):
            resized.append(name)
    if resized:
        raise AdapterStateError(
            f"{listed(resized)} of {view.title} were resized since they got the "
            f"adapter {state.name!r}. Give them their size back, or call "
            f"remove_adapters(model, {state.name!r})."
        )

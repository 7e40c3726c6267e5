"""Switch between the adapters on one base, and show the base itself."""

import difflib
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.record import Record
from lightning_lora.base.states import SWITCH
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import ADAPTERS, LayerAdapter, adapter_for, is_resized
from lightning_lora.layers.norms import freeze_norms, set_frozen
from lightning_lora.model.base_values import tensors_with_originals
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.changed_since_merge import refuse_changed_since_merge
from lightning_lora.model.changes.attach import (
    attach_adapters,
    detach_adapters,
    update_for_changed_weights,
)
from lightning_lora.model.changes.off_layers import convert_to_layer, move_to
from lightning_lora.model.records import find_record, state_of
from lightning_lora.model.show_base import show_adapter, show_base
from lightning_lora.model.start_call import record_of, start_call
from lightning_lora.model.view import View, refuse_lost_adapters, view_of
from lightning_lora.tensors.dicts import without
from lightning_lora.tensors.names import (
    names_joined,
    names_not_in,
    plain_module,
    set_parameter,
    with_all_inside,
)
from lightning_lora.tensors.undo import Undo


def switch_to(model: nn.Module, name: str | None) -> "SwitchBlock":
    """Switch to one adapter of a model, or to its base (None).

    An error changes nothing. The public ``set_adapter`` also takes a sum of several.
    """
    record = record_of(model, "set_adapter")
    check_known(record, name, model)
    block = SwitchBlock(
        model,
        name,
        shown_before=record.name_in_effect,
        active_before=record.adapter.name,
    )
    if name == block.shown_before:
        return block
    if name is None:
        view = view_of(model)
        refuse_changed_since_merge(view)
        show_base(view)
    elif name == block.active_before:
        show_adapter(View(model))
    else:
        _exchange(View(model), record.inactive_adapters[name])
    return block


@dataclass(repr=False)
class SwitchBlock(AbstractContextManager[None]):
    """What a switch returns: a ``with`` block, at whose end the model shows what it did before the call.

    The call has switched already. The block switches again, as it may begin later, or a
    second time.
    """

    model: nn.Module

    name: str | None
    """The adapter that the call has switched to. None: the base."""

    shown_before: str | None
    """The adapter that had its effect before. None: the base was shown."""

    active_before: str
    """The adapter that was on the layers before, with effect or without."""

    def __enter__(self) -> None:
        switch_to(self.model, self.name)

    def __exit__(self, *_: object) -> None:
        record = find_record(self.model)
        if record is None:  # all were removed in the block
            return
        if self.shown_before is None and self.active_before in record.inactive_adapters:
            # the base was shown over the adapter that was active before
            switch_to(self.model, self.active_before)
        switch_to(self.model, self.shown_before)

    def __repr__(self) -> str:
        shown = "its base" if self.name is None else f"its adapter {self.name!r}"
        return f"<{type(plain_module(self.model)).__name__} shows {shown}>"


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, the active one first.

    Args:
        model: Any module. While it shows its base, the first one is on its layers
            without effect.
    """
    record = find_record(model)
    return tuple(record.adapter_states) if record else ()


def disable_adapters(model: nn.Module) -> AbstractContextManager[object]:
    """Show the base, as ``set_adapter(model, None)`` does: in a ``with`` block, or from now on.

    The updates are off. Everything else that was trained has the base's own values, and
    gets no gradient.

    Args:
        model: The model that ``inject_adapters`` was called on, adapted or merged.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights were
            changed.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(4)
        >>> base = model(x)
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(model[0].lora_B)
        >>> with disable_adapters(model):
        ...     torch.equal(model(x), base)
        True
        >>> torch.equal(model(x), base)
        False
    """
    return switch_to(model, None)


def layer_adapters_of(model: nn.Module, name: str) -> dict[str, LayerAdapter]:
    """Return the adapters of this name by layer: active, merged or inactive.

    They share its parameters.
    """
    record = record_of(model)
    check_known(record, name, model)
    if name in record.inactive_adapters:
        return record.inactive_adapters[name].inactive_layer_adapters
    return View(model).active_layer_adapters


def check_known(record: Record, name: str | None, model: nn.Module) -> None:
    """Refuse a name that no adapter has. None is the base's."""
    # it may be of any type
    if name is not None and name not in list(record.adapter_states):
        title = type(plain_module(model)).__name__
        raise AdapterStateError(
            f"{title} has no adapter {name!r}. It has "
            f"{listed(record.adapter_states)}.{_hint(name, record)}"
        )


def _hint(name: object, record: Record) -> str:
    """What may have been meant by a name that no adapter has."""
    near = difflib.get_close_matches(str(name), record.adapter_states)
    if near:
        return f" Did you mean {listed(near)}?"
    return " The base is None." if name == "__base__" else ""


# Another adapter


def check_switchable(view: View) -> None:
    """Refuse to exchange adapters that are in merged weights or in shards."""
    start_call(view.model, SWITCH)
    if view.is_sharded:
        raise AdapterStateError(
            f"The parameters of {view.title} are sharded over processes, where only "
            "set_adapter(model, None) is possible. Switch before the model is sharded."
        )


def prepare_for_model(view: View, state: AdapterState) -> None:
    """Fit an inactive adapter to its layers: kinds, devices and dtypes.

    Refuse layers that are not as it left them.
    """
    check_switchable(view)
    refuse_computed_weights(view)
    _check_still_there(view, state)
    _update_kinds(view, state)
    _check_not_resized(view, state)
    with torch.inference_mode(False), torch.no_grad(), Undo() as undo:
        for name, tensor in state.inactive_tensors.items():
            move_to(tensor, view.tensors[name].device, view.tensors[name].dtype)
        for name, adapter in state.inactive_layer_adapters.items():
            convert_to_layer(view.modules[name], adapter, undo)
        undo.keep()


def _check_still_there(view: View, state: AdapterState) -> None:
    """Refuse a model that has lost what an inactive adapter is for."""
    needed = list(state.inactive_tensors)
    for name, adapter in state.inactive_layer_adapters.items():
        needed += names_joined(name, adapter.weights)
    absent = names_not_in(dict.fromkeys(needed), view.tensors)
    if absent:
        raise AdapterStateError(
            f"{view.title} no longer has {listed(absent)}, for which the adapter "
            f"{state.name!r} is. Give the model its layers back, or call "
            f"remove_adapters(model, {state.name!r})."
        )


def _update_kinds(view: View, state: AdapterState) -> None:
    """Give an inactive adapter the kinds of its layers, which may have been quantised since."""
    for name, adapter in state.inactive_layer_adapters.items():
        if adapter.kind in ADAPTERS.values():  # the others are for any layer
            adapter.kind = adapter_for(view.modules[name]) or adapter.kind


def _check_not_resized(view: View, state: AdapterState) -> None:
    """Refuse layers that were resized while an adapter of theirs was not active."""
    resized = []
    for name, adapter in state.inactive_layer_adapters.items():
        if is_resized(view.modules[name], adapter.kind, adapter.matrices):
            resized.append(name)
    if resized:
        raise AdapterStateError(
            f"{listed(resized)} of {view.title} were resized since they got the "
            f"adapter {state.name!r}. Give them their size back, or call "
            f"remove_adapters(model, {state.name!r})."
        )


@torch.inference_mode(False)
@torch.no_grad()
def _exchange(view: View, coming: AdapterState) -> None:
    """Take the active adapter off, and put another one on: an inactive one, or a new one that has no layers yet.

    All that can fail comes first: an error changes nothing.
    """
    prepare_for_model(view, coming)
    tensors_to_put = _tensors_to_put(view, coming)  # copies need memory
    refuse_lost_adapters(view)
    if view.record.state.shows_base:
        show_adapter(view)

    inactive_tensors = tensors_with_originals(view)
    inactive_layer_adapters = detach_adapters(view)
    for name, tensor in tensors_to_put.items():
        set_parameter(view.model, name, tensor)
    attach_adapters(view, coming.inactive_layer_adapters)
    view.record.note_switched(inactive_layer_adapters, inactive_tensors, coming)

    # from here on, the view shows the coming adapter, which trains other modules in full
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

    They are the coming adapter's own, such as its trained ``head.weight``. What only
    the active adapter has trained gets the base's values.
    """
    to_put = dict(coming.inactive_tensors)
    originals = view.adapter.originals
    bases = dict[Tensor, Tensor]()  # one for each tensor: a tied one has several names
    for name, tensor in without(tensors_with_originals(view), to_put).items():
        if tensor not in bases:
            bases[tensor] = _base_of(tensor, originals[name])
        to_put[name] = bases[tensor]
    return to_put


def _base_of(tensor: Tensor, original: Tensor) -> Tensor:
    """A new tensor like ``tensor``, with the values that the base has in its place."""
    if original.is_meta:  # the model was adapted before it had values
        return tensor
    value = original.to(tensor, copy=True)
    return (
        nn.Parameter(value, requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else value
    )


def activate(model: nn.Module, name: str, config: LoRAConfig | None = None) -> Undo:
    """Make an adapter active, with ``config`` perhaps a new one without layers.

    Use it as a ``with`` block: at its end, the former adapter is active again, a new
    one is dropped, and the base is shown if it was before. ``keep`` prevents all this.
    """
    if config is None or name in adapters(model):
        undo = _undo_activation(model)
        switch_to(model, name)
    else:
        undo = _undo_activation(model, new=name)
        _exchange(View(model), AdapterState(config, name))
    return undo


def _undo_activation(model: nn.Module, new: str | None = None) -> Undo:
    """What makes a model show again what it shows now, after another adapter was made active.

    The adapter that is active now is made so again. Then the ``new`` one is dropped,
    and last, the base is shown, if it is now. An :class:`.Undo` runs its steps from the
    last to the first, so they stand here in reverse.
    """
    active_now = adapters(model)[0]
    undo = Undo()
    if state_of(model).shows_base:
        undo.callback(switch_to, model, None)
    if new is not None:
        undo.callback(_drop_inactive, model, new)
    undo.callback(switch_to, model, active_now)
    return undo


def _drop_inactive(model: nn.Module, name: str) -> None:
    del record_of(model).inactive_adapters[name]

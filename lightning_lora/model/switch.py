"""Switch between the adapters on one base, and show the base itself."""

import difflib
from collections.abc import Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import ADAPTERS, Adapter, adapter_for, is_resized
from lightning_lora.layers.norms import freeze_norms, set_frozen
from lightning_lora.model import attach
from lightning_lora.model.merged import check_as_merged
from lightning_lora.model.record import AdapterState, Record, find_record, record_of
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.names import join, plain_module, set_parameter
from lightning_lora.tensors.shards import is_dtensor, reshard
from lightning_lora.tensors.values import replace_values, set_aside, set_requires_grad


def set_adapter(model: nn.Module, name: str | None) -> "Shown":
    """Switch to another adapter of a model, or to its base (None). An error changes nothing."""
    record = find_record(model) or record_of(model)
    check_known(record, name, model)
    before, active = record.shown, record.adapter.name
    if name is None and before is not None:
        view = view_of(model)
        check_as_merged(view)
        _show_base(view)
    elif name in record.others:
        exchange(View(model), record.others[name])
    elif name != before:
        _show_adapter(View(model))
    return Shown(model, name, before, active)


@dataclass(repr=False)
class Shown(AbstractContextManager[None]):
    """What a model shows since a call. Each ``with`` block shows it, and at its end what was there before the call."""

    model: nn.Module
    name: str | None
    before: str | None
    active: str

    def __enter__(self) -> None:
        set_adapter(self.model, self.name)

    def __exit__(self, *_: object) -> None:
        record = find_record(self.model)  # all may be removed in the block
        if record and self.before is None and self.active in record.others:
            set_adapter(self.model, self.active)
        if record:
            set_adapter(self.model, self.before)

    def __repr__(self) -> str:
        shown = "its base" if self.name is None else f"its adapter {self.name!r}"
        return f"<{type(plain_module(self.model)).__name__} shows {shown}>"


def adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's adapters, the active one first.

    Args:
        model: Any module. While it shows its base, the first one is on its layers without effect.
    """
    record = find_record(model)
    return tuple(record.adapters) if record else ()


def disable_adapters(model: nn.Module) -> AbstractContextManager[object]:
    """Show the base, as ``set_adapter(model, None)`` does: in a ``with`` block, or from now on.

    The updates are off. Everything else that was trained has the base's own values, and gets no gradient.

    Args:
        model: The model that ``inject_adapters`` was called on, adapted or merged.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights were changed.

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
    return set_adapter(model, None)


def adapters_of(model: nn.Module, name: str) -> dict[str, Adapter]:
    """Return the adapters of this name by layer: active, merged or resting. They share its parameters."""
    record = record_of(model)
    check_known(record, name, model)
    if name in record.others:
        return record.others[name].resting
    return record.merged or {layer: each.lora_adapter() for layer, each in View(model).layers.items()}


def check_known(record: Record, name: str | None, model: nn.Module) -> None:
    """Refuse a name that no adapter has. None is the base's."""
    if name is not None and name not in list(record.adapters):  # it may be of any type
        near = difflib.get_close_matches(str(name), record.adapters)
        hint = f" Did you mean {listed(near)}?" if near else " The base is None." * (name == "__base__")
        raise AdapterStateError(
            f"{type(plain_module(model)).__name__} has no adapter {name!r}. It has {listed(record.adapters)}.{hint}"
        )


# Another adapter


def check_switchable(view: View) -> None:
    """Refuse to exchange adapters that are in merged weights or in shards."""
    title = view.title
    if view.is_merged:
        raise AdapterStateError(
            f"The adapter {view.adapter.name!r} is merged into the weights of {title}. Call unmerge_adapters(model) "
            "before another one is used."
        )
    if any(map(is_dtensor, view.parameters.values())):
        raise AdapterStateError(
            f"The parameters of {title} are sharded over processes, where only set_adapter(model, None) is possible. "
            "Switch before the model is sharded."
        )


def move_to_model(view: View, state: AdapterState) -> None:
    """Give a resting adapter the devices and dtypes of its layers. Refuse layers that are not as it left them."""
    check_switchable(view)
    attach.check_weights(view)
    present: dict[str, Tensor] = {**view.parameters, **view.buffers}
    _check_still_there(view, state, present.keys())
    _follow_kinds(view, state)
    _check_not_resized(view, state)
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        for name, tensor in state.own.items():
            attach.move_to(tensor, present[name].device, present[name].dtype)
        for name, adapter in state.resting.items():
            attach.move_to_layer(view.modules[name], adapter, None, undo)
        undo.pop_all()


def _check_still_there(view: View, state: AdapterState, present: Set[str]) -> None:
    """Refuse a model that has lost what a resting adapter is for."""
    needed = list(state.own)
    for name, adapter in state.resting.items():
        needed += [join(name, matrix.weight) for matrix in adapter.matrices]
    absent = [name for name in dict.fromkeys(needed) if name not in present]
    if absent:
        raise AdapterStateError(
            f"{view.title} no longer has {listed(absent)}, for which the adapter {state.name!r} is. Give the model its "
            f"layers back, or call remove_adapters(model, {state.name!r})."
        )


def _follow_kinds(view: View, state: AdapterState) -> None:
    """Give a resting adapter the kinds of its layers, which may have been quantised since."""
    for name, adapter in state.resting.items():
        if adapter.kind in ADAPTERS.values():  # the others are for any layer
            adapter.kind = adapter_for(view.modules[name]) or adapter.kind


def _check_not_resized(view: View, state: AdapterState) -> None:
    """Refuse layers that were resized while an adapter of theirs was resting."""
    resized = [name for name, adapter in state.resting.items() if is_resized(view.modules[name], adapter)]
    if resized:
        raise AdapterStateError(
            f"{listed(resized)} of {view.title} were resized since they got the adapter {state.name!r}. Give them "
            f"their size back, or call remove_adapters(model, {state.name!r})."
        )


@torch.inference_mode(False)
@torch.no_grad()
def exchange(view: View, coming: AdapterState) -> None:
    """Take the active adapter off, and put another one on: a resting one, or a new one that has no layers yet."""
    move_to_model(view, coming)
    put = _tensors_to_put(view, coming)  # what needs memory comes first
    view.check_present()
    if view.record.is_disabled:
        _show_adapter(view)
    record, own = view.record, view.kept
    resting = attach.detach_adapters(view)
    for name, tensor in put.items():
        set_parameter(view.model, name, tensor)
    attach.attach_adapters(view, coming.resting)
    view.look_again(coming.config)
    for inner in chain.from_iterable(map(nn.Module.modules, view.saved)):
        set_frozen(inner, False)
    freeze_norms(view.modules.values(), view.saved)
    attach.weights_have_changed(view)
    record.was_switched(resting, own, coming)


def _tensors_to_put(view: View, coming: AdapterState) -> dict[str, Tensor]:
    """The adapter's own tensors by name. Where only the active one has its own, the base's."""
    put, made = dict(coming.own), dict[int, Tensor]()
    for name, tensor in view.kept.items():
        if name not in put:
            if id(tensor) not in made:  # a tied one has several names
                made[id(tensor)] = _base_of(tensor, view.adapter.originals[name])
            put[name] = made[id(tensor)]
    return put


def _base_of(tensor: Tensor, original: Tensor) -> Tensor:
    """A tensor with the base's values, where an adapter has ``tensor``."""
    if original.is_meta:  # the model was adapted before it had values
        return tensor
    value = original.to(tensor, copy=True)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def activate(model: nn.Module, name: str, config: LoRAConfig | None = None) -> ExitStack:
    """Make an adapter active, with ``config`` perhaps a new one without layers. Return what undoes it."""
    names, record, undo = adapters(model), find_record(model), ExitStack()
    if record is not None and record.is_disabled:
        undo.callback(set_adapter, model, None)
    if config is None or name in names:
        set_adapter(model, name)
    else:
        exchange(View(model), AdapterState(config, name))
        undo.callback(lambda: record_of(model).others.pop(name))
    undo.callback(set_adapter, model, names[0])
    return undo


# The base


@torch.inference_mode(False)  # where a parameter would become an inference tensor, which never trains again
def _show_base(view: View) -> None:
    """Turn the updates off. Merged weights and what was trained beside them get the base's values."""
    record, values = view.record, dict[int, tuple[Tensor, Tensor]]()
    for name, tensor in view.kept.items():
        original = view.adapter.originals[name].to(tensor, copy=True)
        if not original.is_meta and name not in record.filled:  # the model was adapted before it had values
            values[id(tensor)] = tensor, original
    for weight in view.merged:
        _, base = values.get(id(weight.base), (None, weight.base))  # a tied weight's other use may have trained
        values[id(weight.shown)] = weight.shown, base.detach().to(weight.shown)
    for name, seen in {**record.merge.weights, **record.merge.others}.items() if record.merge else ():
        if is_dtensor(view.parameters.get(name)):
            seen.digest()  # the values are written into the same memory: later, only their digest tells them apart
    aside = dict[str, tuple[Tensor, bool]]()
    names = {id(tensor): name for name, tensor in {**view.buffers, **view.parameters}.items()}
    for key, (tensor, base) in values.items():
        if key in names:
            aside[names[key]] = set_aside(tensor) if is_dtensor(tensor) else tensor.data, tensor.requires_grad
            set_requires_grad(tensor, False)  # a gradient at the base's values would move what was trained
            replace_values(tensor, base)
    for layer in view.layers.values():
        layer.lora_enabled = False
    torch.clear_autocast_cache()  # it may hold copies of the other values
    record.is_disabled, record.aside = True, aside


@torch.inference_mode(False)
def _show_adapter(view: View) -> None:
    """Give the active adapter, or the merged weights, their effect back."""
    reshard(view.model)  # so that the next forward pass gathers what is put back
    present: dict[str, Tensor] = {**view.buffers, **view.parameters}
    aside = {name: each for name, each in view.record.aside.items() if name in present}
    moved = [values.to(present[name]) for name, (values, _) in aside.items()]  # it may have been converted since
    for (name, (_, trains)), values in zip(aside.items(), moved, strict=True):
        replace_values(present[name], values)
        set_requires_grad(present[name], trains)
    for layer in view.layers.values():
        layer.lora_enabled = True
    torch.clear_autocast_cache()
    view.record.is_disabled, view.record.aside = False, {}

"""Switch between the adapters on one base, and show the base itself."""

import difflib
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_, setitem
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import ADAPTERS, Adapter, adapter_for
from lightning_lora.layers.norms import freeze_norms, set_frozen
from lightning_lora.model import attach
from lightning_lora.model.adapter_state import AdapterState, Parts
from lightning_lora.model.merged import check_as_merged, is_as_merged
from lightning_lora.model.state import Record, find_record, receive, record_of
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.names import own_parameter, plain_module, set_parameter
from lightning_lora.tensors.shards import is_dtensor, reshard
from lightning_lora.tensors.values import replace_values, same_bits, set_aside, set_requires_grad


def set_adapter(model: nn.Module, name: str | None) -> AbstractContextManager[object]:
    """Switch to another adapter of a model, or to its base.

    The layers get the other adapter's parameters, and the model its own trained modules, biases and buffers. These are
    the same objects as before, so that an optimizer keeps what it trains: no value is written or copied. The first
    switch between two adapters walks through the model. If both adapt the same layers, later ones take microseconds.

    Args:
        model: A model with adapters, which are not merged.
        name: The adapter's name. ``None`` shows the base, as ``disable_adapters`` does. The active adapter then stays
            on its layers without effect.

    Returns:
        A context manager: at the end of a ``with`` block, the model shows what it did before. Else the switch stays.

    Raises:
        AdapterStateError: there is no adapter of this name, or the model is merged, sharded (FSDP2), or has lost
            layers that the adapter is for. Nothing has changed then.

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2), name="de")
        >>> names = inject_adapters(model, LoRAConfig(r=2), name="fr")
        >>> adapters(model)
        ('fr', 'de')
        >>> with set_adapter(model, "de"):
        ...     adapters(model)
        ('de', 'fr')
    """
    record = find_record(model)
    before = record.shown if record else None
    if record is None or (name != before and not _exchange(record, name)):
        _switch(model, name)
    return _Shown(model, name, before)


@dataclass(repr=False)
class _Shown(AbstractContextManager[None]):
    """What a model shows since a call. Each ``with`` block shows it, and at its end what was there before the call."""

    model: nn.Module
    name: str | None
    before: str | None

    def __enter__(self) -> None:
        set_adapter(self.model, self.name)

    def __exit__(self, *_: object) -> None:
        if find_record(self.model):  # all may be removed in the block
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
    if record is None or not is_as_merged(model):
        record = receive(model) or record  # of a fit in other processes
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
    return record.merged or {layer: each._lora_adapter() for layer, each in View(model).layers.items()}


def check_known(record: Record, name: str | None, model: nn.Module) -> None:
    """Refuse a name that no adapter has. None is the base's."""
    if name is not None and name not in record.adapters:
        near = difflib.get_close_matches(str(name), record.adapters)
        hint = f" Did you mean {listed(near)}?" if near else ""
        raise AdapterStateError(
            f"{type(plain_module(model)).__name__} has no adapter {name!r}. It has {listed(record.adapters)}.{hint}"
        )


# Another adapter


def _switch(model: nn.Module, name: str | None) -> None:
    """Switch, where nothing is prepared."""
    record = find_record(model) or record_of(model)
    check_known(record, name, model)
    if name is None:
        _show_base(model)
    elif name in record.others:
        change(model, record.others[name])
    elif record.is_disabled:
        _show_adapter(model)


def check_switchable(model: nn.Module, needed: Iterable[str] = ()) -> None:
    """Refuse to exchange adapters that are in merged weights or in shards, or of layers that are gone."""
    view = View(model)
    title, present = type(view.model).__name__, {**view.modules, **view.parameters, **view.buffers}
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
    if absent := [name for name in needed if name not in present]:
        raise AdapterStateError(
            f"{title} no longer has {listed(absent)}, for which this adapter is. Give the model its layers back, or "
            "call remove_adapters(model, name)."
        )


def change(model: nn.Module, coming: AdapterState) -> None:
    """Take the active adapter off, and put another one on: a resting one, or a new one that has no layers yet."""
    check_switchable(model, (*coming.resting, *coming.own))
    view = View(model)
    attach.check_weights(view)
    if view.record.is_disabled:
        _show_adapter(model)
    view = view_of(model)
    record, own = view.record, view.kept
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        put = _tensors_to_put(view, coming)
        for name, adapter in coming.resting.items():
            if adapter.kind in ADAPTERS.values():  # the others are for any layer
                adapter.kind = adapter_for(view.modules[name]) or adapter.kind
            attach.follow_layer(view.modules[name], adapter, None, undo)
        undo.pop_all()
    before = _Contents(view, coming)
    resting = attach.detach_adapters(view)
    for name, tensor in put.items():
        if name not in own:
            record.base[name] = {**view.parameters, **view.buffers}[name]
        set_parameter(view.model, name, tensor)
    attach.attach_adapters(view.model, coming.resting)
    record.was_switched((resting, own), coming)
    now = View(model)
    for inner in chain.from_iterable(map(nn.Module.modules, now.saved)):
        set_frozen(inner, False)
    freeze_norms(now.modules.values(), now.saved)
    for layer in now.layers.values():
        layer.lora_weights_changed()
    torch.clear_autocast_cache()
    before.prepare(now)


def _anchors(view: View) -> list[Tensor]:
    """The tensors whose device and dtype an adapter follows: each adapted layer's weight, and its own."""
    weights = [own_parameter(layer, layer.lora_matrices[0].weight) for layer in view.layers.values()]
    return [*weights, *view.kept.values()]


def _tensors_to_put(view: View, coming: AdapterState) -> dict[str, Tensor]:
    """The adapter's own tensors by name, and the base's where the active one has its own."""
    put, made, present = dict(coming.own), dict[int, Tensor](), {**view.parameters, **view.buffers}
    for name, tensor in coming.own.items():
        attach.follow(tensor, present[name].device, present[name].dtype)
    for name, tensor in view.kept.items():
        if name not in put:
            if id(tensor) not in made:  # a tied one has several names
                made[id(tensor)] = _base_of(view.record.base.get(name), tensor, view.adapter.originals[name])
            put[name] = made[id(tensor)]
    return put


def _base_of(known: Tensor | None, tensor: Tensor, original: Tensor) -> Tensor:
    """The base's tensor where an adapter has ``tensor``: the one that was there before, or a new one."""
    if original.is_meta:  # the model was adapted before it had values
        return tensor
    if known is not None and known is not tensor and _about(known) == _about(tensor) and same_bits(known, original):
        return known
    value = original.to(tensor, copy=True)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


def show(model: nn.Module, name: str, config: LoRAConfig | None = None) -> ExitStack:
    """Make an adapter active, with ``config`` perhaps a new one without layers. Return what undoes it."""
    names, record, undo = adapters(model), find_record(model), ExitStack()
    if record is not None and record.is_disabled:
        undo.callback(set_adapter, model, None)
    if config is None or name in names:
        set_adapter(model, name)
    else:
        change(model, AdapterState(config, name))
        undo.callback(lambda: record_of(model).was_dropped(name))
    undo.callback(set_adapter, model, names[0])
    return undo


# A prepared switch

_Entry = tuple[dict[str, Any], str, Any]  # of a dict: this key has this value

_about = attrgetter("dtype", "device")


class _Exchange:
    """What a switch exchanges: entries of the dicts in which modules hold their attributes, parameters and buffers.

    It is of use only while the model is as it was then. So each of ``entries`` must be what it was: those that get the
    ``new`` values, and after them each module in its parent. And each of ``anchors`` must have its device and dtype.
    If not, all exchanges are dropped, and prepared anew.
    """

    def __init__(self, entries: list[_Entry], new: list[_Entry], anchors: list[Tensor], parts: Parts) -> None:
        self.dicts, self.keys, self.old = map(tuple, zip(*entries, strict=True))
        self.new, self.parts = [value for _, _, value in new], parts
        self.anchors, self.seen = anchors, list(map(_about, anchors))

    def is_current(self) -> bool:
        """Whether the model is as it was."""
        is_same = all(map(is_, map(dict.get, self.dicts, self.keys), self.old))
        return is_same and list(map(_about, self.anchors)) == self.seen


def _exchange(record: Record, name: str | None) -> bool:
    """Make a prepared switch, if there is one and the model is as it was when it was prepared."""
    found: _Exchange | None = record.prepared.get((record.shown, name))
    if found is None or name is None or record.is_merged:
        return False
    if not found.is_current():
        record.prepared.clear()
        return False
    deque(map(setitem, found.dicts, found.keys, found.new), maxlen=0)
    record.was_switched(found.parts, record.others[name])
    return True


class _Contents:
    """What the modules of a model hold before a switch: the difference to after it is what later ones exchange."""

    def __init__(self, view: View, coming: AdapterState) -> None:
        self.leaving, self.anchors = view.adapter, _anchors(view)
        self.parts, self.classes = (coming.resting, coming.own), {each: type(each) for each in view.modules.values()}
        self.held = list[tuple[dict[str, Any], dict[str, Any]]]()
        for module in self.classes:
            for held in (vars(module), module._parameters, module._buffers):
                self.held.append((held, dict(held)))

    def prepare(self, now: View) -> None:
        """Prepare the switch that was made, and the one back, if they change no class."""
        is_plain = all(type(module) is kind for module, kind in self.classes.items())
        is_plain &= all(held.keys() == was.keys() for held, was in self.held)
        if not is_plain:
            return
        before, after, places = list[_Entry](), list[_Entry](), list[_Entry]()
        for held, was in self.held:
            for key in was:
                if _differs(was[key], held[key]):
                    before.append((held, key, was[key]))
                    after.append((held, key, held[key]))
        for module in now.model.modules():
            for key, child in module._modules.items():
                places.append((module._modules, key, child))
        leaving, coming = self.leaving, now.adapter
        there = _Exchange([*before, *places], after, self.anchors, (leaving.resting, leaving.own))
        back = _Exchange([*after, *places], before, _anchors(now), self.parts)
        now.record.prepared.update({(leaving.name, coming.name): there, (coming.name, leaving.name): back})


def _differs(was: object, now: object) -> bool:
    """Whether a switch exchanges one value for the other. Equal settings need not be; a dict may change in place."""
    return was is not now and (isinstance(now, Tensor) or (isinstance(now, dict) and bool(now)) or was != now)


# The base


@torch.inference_mode(False)  # where a parameter would become an inference tensor, which never trains again
def _show_base(model: nn.Module) -> None:
    """Turn the updates off, and let the base's values be in merged weights, and in what was trained beside them."""
    check_as_merged(model)
    view = view_of(model)
    record, values = view.record, dict[int, tuple[Tensor, Tensor]]()
    for name, tensor in view.kept.items():
        original = view.adapter.originals[name].to(tensor, copy=True)
        if not original.is_meta:  # the model was adapted before it had values
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
    record.base_is_shown(aside)


@torch.inference_mode(False)
def _show_adapter(model: nn.Module) -> None:
    """Give the active adapter, or the merged weights, their effect back."""
    reshard(model)  # so that the next forward pass gathers what is put back
    view = View(model)
    present: dict[str, Tensor] = {**view.buffers, **view.parameters}
    for name, (values, trains) in view.record.aside.items():
        if name in present:
            tensor = present[name]
            if values.dtype is not tensor.dtype or values.device != tensor.device:  # converted or moved since
                values = values.to(tensor)
            replace_values(tensor, values)
            set_requires_grad(tensor, trains)
    for layer in view.layers.values():
        layer.lora_enabled = True
    torch.clear_autocast_cache()
    view.record.base_is_shown(None)

"""The one way in: stored adapters are read, checked as a whole, and then written, or nothing is.

All that loads adapters leads here: ``load_adapter`` and ``load_from_checkpoint`` (``files.py``), a Trainer's checkpoint
(``checkpoint.py``), sums of adapters (``several.py``), and state dicts (``from_state_dicts.py``), also those that torch
loads.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.config import LoRAConfig
from lightning_lora.model.attach import undone_on_error
from lightning_lora.model.base_values import base_value, base_values, keep_frozen, restore_originals
from lightning_lora.model.inject import inject
from lightning_lora.model.merge import merge, unmerge_or_forget, unmerged
from lightning_lora.model.record import check_start, find_record, keep_record, record_of
from lightning_lora.model.switch import activate, set_adapter
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.load.fits import check_fits, check_state_fits
from lightning_lora.storage.stored import StoredAdapters
from lightning_lora.tensors.named import not_in, of_type, only
from lightning_lora.tensors.names import is_bias, join, own_parameter
from lightning_lora.tensors.plain_states import StateDict, load_state_dict, state_dict
from lightning_lora.tensors.values import replace_values

Reader = Callable[[View], StoredAdapters]
"""Reads what a file holds for a model that is not merged, by the model's names."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """What differs between the ways in."""

    call: str  # the user's call, as an error names it
    adapts: bool = False  # whether a plain model is adapted first. One that was merged then stays unmerged
    name: str | None = None  # of the adapter. None: the active one
    is_described: bool = True  # otherwise there is a state alone, and nothing says how it was trained
    refuses_base: bool = True  # otherwise another base is only named
    reads_base: bool = True  # otherwise the base has just been read, and is only looked at


def put(model: nn.Module, stored: StoredAdapters | Reader, way: Way) -> None:
    """Put stored adapters on a model. Everything is checked before anything is written, and an error changes nothing.

    Beside the active adapter, one of another name is loaded, and stays inactive.
    """
    record = check_start(model, way.call)
    if record is not None and way.name is not None and way.name != record.adapter.name:
        _put_beside(model, record.adapter, way.name, stored, way)
        return
    with _opened(model, way) as view:
        if not isinstance(stored, StoredAdapters):
            stored = stored(view)
        if way.adapts:
            is_new = _adapt_if_plain(view, stored.config, way)
            stored = _with_values_of_base(view, stored, is_new=is_new)
        if way.is_described:
            check_fits(view, stored, reads_base=way.reads_base, refuses_base=way.refuses_base)
            _note_description(view, stored)
        else:
            check_state_fits(view, stored.state)
        _write(view, stored.state)


def _put_beside(model: nn.Module, active: AdapterState, name: str, stored: StoredAdapters | Reader, way: Way) -> None:
    """Put an adapter beside the active one."""
    with unmerged(model), activate(model, name, active.config) as undo:
        put(model, stored, way)
        undo.pop_all()
        set_adapter(model, active.name)


# Open a model for the change


def _opened(model: nn.Module, way: Way) -> AbstractContextManager[View]:
    """Take a merge out of a model for a change, and undo all after an error."""
    if way.adapts:
        return _opened_to_adapt(model)
    return _opened_to_write(model)


@contextmanager
def _opened_to_write(model: nn.Module) -> Iterator[View]:
    """Open a model that is adapted. If it is merged, it is merged again with the new adapters."""
    view_of(model)  # refuses one that has no adapters, or has lost some
    with unmerged(model):
        yield view_of(model)


@contextmanager
def _opened_to_adapt(model: nn.Module) -> Iterator[View]:
    """Open a model that may be plain. It stays unmerged."""
    record = find_record(model)
    was_merged = False
    try:
        was_merged = unmerge_or_forget(model)
        view = View(model)
        with undone_on_error(view):
            yield view
    except BaseException:
        if was_merged:
            merge(model)
        elif record is not None and record.is_merged:  # its weights were replaced: it is as it was
            keep_record(model, record)
        raise


# Adapt a plain model


def _adapt_if_plain(view: View, config: LoRAConfig, way: Way) -> bool:
    """Adapt a model as a file says, if it has no adapters of its own. Return whether it had none."""
    is_new = not view.is_adapted or not view.adapter.layers
    if is_new:
        inject(view.model, config, name=_name_of_new(view, way), find_still=False)
        view.look_again()
    record_of(view.model)  # refuses one that shows its base
    view.check_present()
    return is_new


def _name_of_new(view: View, way: Way) -> str:
    """The name of an adapter that is new on a model."""
    if view.is_adapted:  # it has an adapter without layers
        return view.adapter.name
    return "default" if way.name is None else way.name


def _with_values_of_base(view: View, stored: StoredAdapters, *, is_new: bool) -> StoredAdapters:
    """Add what files of other libraries do not hold: base values of what trains, and start values from the base."""
    if stored.base:
        return stored
    added = dict[str, Any]()
    for name in view.trained:
        if is_new or is_bias(name):
            added[name] = base_value(view, name)
    for layer_name, layer in view.layers.items():
        for parameter, about in layer.lora_roles().items():
            if not about.role.trains:
                added[join(layer_name, parameter)] = own_parameter(layer, parameter).detach()
    return replace(stored, state={**added, **stored.state})


# Write

WRITTEN = "lightning_lora_written"  # in torch's notes on what is written here: it is no news for the model's hook


def _note_description(view: View, stored: StoredAdapters) -> None:
    """Note what a file says of frozen weights and buffers, if it is one of this package."""
    if stored.base:
        view.adapter.random = tuple(stored.random)
        view.record.base.buffers_were_filled(stored.filled)


def _write(view: View, state: StateDict) -> None:
    """Write a state that has been checked. If a module's own loading fails, restore the old values."""
    keep_frozen(view, only(view.frozen, state))
    with ExitStack() as undo:
        undo.callback(load_state_dict, view.model, _copies_of_written(view, state), notes=[WRITTEN])
        _write_filled_buffers(view, state, undo)
        restore_originals(view, _left_to_the_base(view, state), undo)
        load_state_dict(view.model, state, notes=[WRITTEN])
        view.record.values_were_loaded(base_values(view))
        undo.pop_all()


def _copies_of_written(view: View, state: StateDict) -> dict[str, Tensor]:
    """Copies of the tensors of a model that are written."""
    present = of_type(state_dict(view.model), Tensor)
    written = only(present, {*state, *view.adapter.originals})
    return {name: tensor.clone() for name, tensor in written.items()}


def _write_filled_buffers(view: View, state: StateDict, undo: ExitStack) -> None:
    """Write buffers that hooks filled: they may have another shape here, and a dtype that would round."""
    for name, value in only(state, view.record.base.filled).items():
        buffer = view.buffers[name]
        dtype = buffer.dtype
        if dtype.itemsize > 2:
            dtype = torch.promote_types(dtype, value.dtype)
        undo.callback(replace_values, buffer, buffer.data)
        replace_values(buffer, value.to(buffer.device, dtype, copy=True))


def _left_to_the_base(view: View, state: StateDict) -> Iterable[str]:
    """What has other values than the base, does not train, and is not in a state: it gets the base's."""
    return not_in(view.adapter.originals, {*state, *view.trained})

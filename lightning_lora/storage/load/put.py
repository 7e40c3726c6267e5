"""The one way in: stored adapters are read, checked as a whole, and then written, or nothing is.

All that loads adapters leads here. :func:`adapt_and_put` takes a plain model too: for
``load_adapter`` and ``load_from_checkpoint`` (``files.py``), and sums of adapters
(``several.py``). :func:`put` takes an adapted one: for a Trainer's checkpoint
(``checkpoint.py``), and state dicts that torch loads (``from_state_dicts.py``). And
:func:`put_state` has nothing but the state.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_lora.base.record import Record
from lightning_lora.config import LoRAConfig
from lightning_lora.model.base_values import (
    base_values,
    keep_frozen,
    kept_or_present_value,
    restore_originals,
)
from lightning_lora.model.changes.undone import undone_on_error
from lightning_lora.model.inject import inject_from_file
from lightning_lora.model.merge import merge
from lightning_lora.model.records import find_record, keep_record, state_of
from lightning_lora.model.start_call import record_of, start_call
from lightning_lora.model.switch import activate, switch_to
from lightning_lora.model.unmerge import unmerge_or_forget, unmerged
from lightning_lora.model.view import View, refuse_lost_adapters, view_of
from lightning_lora.storage.load.fits import check_fits, check_state_fits
from lightning_lora.storage.state import copies_of
from lightning_lora.storage.stored import ReadFor, StoredAdapters
from lightning_lora.tensors.dicts import of_type, only
from lightning_lora.tensors.names import is_bias, join, names_not_in, own_parameter
from lightning_lora.tensors.plain_states import StateDict, load_state_dict, state_dict
from lightning_lora.tensors.undo import Undo
from lightning_lora.tensors.values import replace_values


def adapt_and_put(
    model: nn.Module,
    read: ReadFor,
    *,
    name: str | None = None,
    refuses_other_base: bool = True,
) -> None:
    """Put the adapters of a file on a model, which is adapted first if it is plain.

    An error changes nothing.

    Args:
        model: The model. If it was merged, and the active adapter is replaced, it stays
            unmerged. If another adapter is loaded beside the active one, the model is
            merged again, with the active one.
        read: Reads the file.
        name: The adapter's name. Beside the active adapter, another one is loaded, and
            stays inactive. None: the active one.
        refuses_other_base: Whether another base is refused. Otherwise it is only named.
    """
    record = start_call(model, "load_adapter")
    if record is None or name is None or name == record.adapter.name:
        _put_in_place_of_active(
            model, read, name, refuses_other_base=refuses_other_base
        )
        return
    active = record.adapter
    # the model is not merged inside this block, so the inner call has no merge to undo
    with unmerged(model), activate(model, name, active.config) as undo:
        _put_in_place_of_active(
            model, read, name, refuses_other_base=refuses_other_base
        )
        undo.keep()
        switch_to(model, active.name)


def put(
    model: nn.Module, stored: StoredAdapters, *, call: str, reads_base_anew: bool = True
) -> None:
    """Put stored adapters on an adapted model. An error changes nothing.

    Args:
        model: The model. If it is merged, it is merged again with the new adapters.
        stored: The adapters, by the model's names.
        call: The user's call, as an error names it.
        reads_base_anew: Whether all of the base is read to be compared. Otherwise it
            has just been read.
    """
    start_call(model, call)
    with _opened(model) as view:
        check_fits(
            view, stored, reads_base_anew=reads_base_anew, refuses_other_base=True
        )
        _write_adapters(view, stored)


def put_state(model: nn.Module, state: StateDict) -> None:
    """Put a state alone on an adapted model, as :func:`put` does: nothing says how it was trained."""
    start_call(model, "load_adapter_state_dict")
    with _opened(model) as view:
        check_state_fits(view, state)
        _write_state(view, state)


def _put_in_place_of_active(
    model: nn.Module, read: ReadFor, name: str | None, *, refuses_other_base: bool
) -> None:
    """Put the adapters of a file in the place of the active one."""
    with _opened_to_adapt(model) as view:
        stored = read(view)
        is_new = _adapt_if_plain(view, stored.config, name)
        stored = _with_values_of_base(view, stored, is_new=is_new)
        check_fits(
            view, stored, reads_base_anew=True, refuses_other_base=refuses_other_base
        )
        _write_adapters(view, stored)


# Open a model for the change: take a merge out of it, and restore it after an error
#
# After an error, three parts restore it. The ``Undo`` in ``_write_state`` restores
# values, and which of them are kept of the base. ``undone_on_error`` restores adapters,
# records and ``requires_grad``: only a model that may be adapted needs it. A merge comes
# back by ``unmerged`` in ``_opened``, and by ``_restore_merge`` in ``_opened_to_adapt``.


@contextmanager
def _opened(model: nn.Module) -> Iterator[View]:
    """Open a model that is adapted.

    If it is merged, it is merged again with the new adapters.
    """
    view_of(model)  # refuses one that has no adapters, or has lost some
    with unmerged(model):
        yield view_of(model)


@contextmanager
def _opened_to_adapt(model: nn.Module) -> Iterator[View]:
    """Open a model that may be plain.

    It stays unmerged. Only an error merges it again.
    """
    record = find_record(model)
    was_merged = record is not None and record.state.is_merged
    try:
        unmerge_or_forget(model)
        view = View(model)
        with undone_on_error(view):
            yield view
    except BaseException:
        if record is not None and was_merged:
            _restore_merge(model, record)
        raise


def _restore_merge(model: nn.Module, record: Record) -> None:
    """Undo what :func:`unmerge_or_forget` has done to a merged model."""
    was_forgotten = find_record(model) is None
    if was_forgotten:
        keep_record(model, record)
    elif not state_of(model).is_merged:
        merge(model)


# Adapt a plain model


def _adapt_if_plain(view: View, config: LoRAConfig, name: str | None) -> bool:
    """Adapt a model as a file says, if it has no adapters of its own.

    Return whether it had none.
    """
    is_new = not view.is_adapted or not view.adapter.layers
    if is_new:
        inject_from_file(view.model, config, name=_name_of_new(view, name))
        view.look_again()
    record_of(view.model)  # refuses one that shows its base
    refuse_lost_adapters(view)
    return is_new


def _name_of_new(view: View, name: str | None) -> str:
    """The name of an adapter that is new on a model."""
    if view.is_adapted:  # it has an adapter without layers
        return view.adapter.name
    return "default" if name is None else name


def _with_values_of_base(
    view: View, stored: StoredAdapters, *, is_new: bool
) -> StoredAdapters:
    """Add what files of other libraries do not hold, because it is the base's. What they hold stays."""
    if stored.names_its_base:
        return stored
    trained = _base_values_of_trained(view, is_new=is_new)
    return replace(
        stored, state={**trained, **_frozen_in_adapters(view), **stored.state}
    )


def _base_values_of_trained(view: View, *, is_new: bool) -> dict[str, Tensor]:
    """The base's values of what trains in full, for a file that may lack these.

    If the model had adapters before, the file may lack biases alone.
    """
    names = [name for name in view.trainable_base if is_new or is_bias(name)]
    return {name: kept_or_present_value(view, name) for name in names}


def _frozen_in_adapters(view: View) -> dict[str, Tensor]:
    """The adapters' parameters that do not train: they were computed from the base."""
    frozen = dict[str, Tensor]()
    for layer_name, layer in view.layers.items():
        for parameter, spec in layer.lora_specs().items():
            if not spec.role.trains:
                frozen[join(layer_name, parameter)] = own_parameter(
                    layer, parameter
                ).detach()
    return frozen


# Write

BEING_WRITTEN = "lightning_lora_written"
"""In torch's notes on a state that is written here: so the model's own hook, ``before_load``, lets it pass."""


def _write_adapters(view: View, stored: StoredAdapters) -> None:
    """Write adapters that have been checked.

    Files of this package say which weights and buffers belong to no base. The model
    remembers both as ``random_weights``. It does so at the end, when nothing can fail
    any more: no :class:`.Undo` would take this back.
    """
    _write_state(view, stored.state, filled=stored.filled_in_state)
    if stored.names_its_base:
        view.adapter.random_weights = tuple(stored.of_no_base)
        view.record.base.note_filled(stored.filled_in_state)


def _write_state(view: View, state: StateDict, filled: Iterable[str] = ()) -> None:
    """Write a state that has been checked. If a module's own loading fails, restore the old values.

    Args:
        view: The model.
        state: The values.
        filled: The buffers in the state that hooks have filled where it comes from.
            The model may have filled others.
    """
    with Undo() as undo:
        old_values = _copies_of_written(view, state)
        undo.callback(load_state_dict, view.model, old_values, notes=[BEING_WRITTEN])
        _keep_frozen(view, state, undo)
        filled_anywhere = {*filled, *view.record.base.filled}
        _write_filled_buffers(view, only(state, filled_anywhere), undo)
        restore_originals(view, _left_to_the_base(view, state), undo)
        load_state_dict(view.model, state, notes=[BEING_WRITTEN])
        view.record.note_adapter_loaded(base_values(view))
        undo.keep()


def _keep_frozen(view: View, state: StateDict, undo: Undo) -> None:
    """Keep the base's values of the frozen weights that get others."""
    adapter = view.adapter
    undo.callback(setattr, adapter, "originals", dict(adapter.originals))
    keep_frozen(view, only(view.frozen_base, state))


def _copies_of_written(view: View, state: StateDict) -> dict[str, Tensor]:
    """Copies of the tensors of a model that are written."""
    present = of_type(state_dict(view.model), Tensor)
    return copies_of(only(present, {*state, *view.adapter.originals}))


def _write_filled_buffers(view: View, values: StateDict, undo: Undo) -> None:
    """Write buffers that hooks filled: they may have another shape here, and a dtype that would round."""
    for name, value in values.items():
        buffer = view.buffers[name]
        dtype = buffer.dtype
        # a model in half precision stays so: its code may compute in nothing else
        if dtype.itemsize > 2:
            dtype = torch.promote_types(dtype, value.dtype)
        undo.callback(replace_values, buffer, buffer.data)
        replace_values(buffer, value.to(buffer.device, dtype, copy=True))


def _left_to_the_base(view: View, state: StateDict) -> Iterable[str]:
    """The names of tensors that get the base's values: kept, not trained, not in a state."""
    return names_not_in(view.adapter.originals, {*state, *view.trainable_base})

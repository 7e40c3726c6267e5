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

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.config import LoRAConfig
from lightning_lora.model.base_values import (
    base_values,
    keep_frozen,
    kept_or_present_value,
    restore_originals,
)
from lightning_lora.model.changes.undone import undone_on_error
from lightning_lora.model.inject import inject_from_file
from lightning_lora.model.start_call import start_call
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
    # load_from_checkpoint and sums follow the rule of load_adapter, and errors name it
    record = start_call(model, "load_adapter")
    if record is None or name is None or name == record.adapter.name:
        opened = _opened_to_adapt(model)
    else:
        opened = _opened_beside(model, record.adapter, name)
    with opened as view:
        stored = read(view)
        is_new = _has_no_layers_yet(view)
        if is_new:
            _adapt_as_file_says(view, stored.config, name)
        refuse_lost_adapters(view)
        stored = _with_values_of_base(view, stored, is_new=is_new)
        check_fits(
            view, stored, reads_base_anew=True, refuses_other_base=refuses_other_base
        )
        _write_adapters(view, stored)


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
    with _opened(model, call) as view:
        check_fits(
            view, stored, reads_base_anew=reads_base_anew, refuses_other_base=True
        )
        _write_adapters(view, stored)


def put_state(model: nn.Module, state: StateDict) -> None:
    """Put a state alone on an adapted model, as :func:`put` does: nothing says how it was trained."""
    with _opened(model, "load_adapter_state_dict") as view:
        check_state_fits(view, state)
        _write_state(view, state)


# Open a model for the change
#
# Each of the three blocks yields a view of the model: it is not merged, and the adapter to
# be written is the active one. After an error, a block restores the model, but for its
# values: ``_write_state`` restores these.
#
#     block               takes                 the model at the end
#     _opened             an adapted model      merged again, if it was
#     _opened_to_adapt    any model             unmerged
#     _opened_beside      an adapted model      the earlier adapter is active again,
#                                               and merged again, if it was


@contextmanager
def _opened(model: nn.Module, call: str) -> Iterator[View]:
    """Open a model that is adapted.

    If it is merged, it is merged again at the end: with the new adapters, or after an
    error with the old ones. Its layers stay adapted as they are, so nothing else needs to
    be restored.
    """
    view_of(model, call)  # refuses a model without adapters, or one that has lost some
    with unmerged(model):
        yield View(model)


@contextmanager
def _opened_to_adapt(model: nn.Module) -> Iterator[View]:
    """Open a model that may be plain.

    If it is merged, it is unmerged and stays so. But if its weights were replaced since
    the merge, its adapters are dropped, with a warning. An error undoes either.
    """
    with Undo() as undo:
        unmerge_or_forget(model, undo)
        view = View(model)
        with undone_on_error(view):
            yield view
        undo.keep()


@contextmanager
def _opened_beside(model: nn.Module, active: AdapterState, name: str) -> Iterator[View]:
    """Open a model for another adapter than the active one, which is active again at the end.

    Then the model is also merged again, if it was. If it has no adapter of this name,
    ``activate`` makes one without layers, and drops it after an error. ``activate`` needs
    a configuration for that: the file's takes its place later.
    """
    with unmerged(model), activate(model, name, active.config) as undo:
        view = View(model)
        with undone_on_error(view):
            yield view
        # otherwise the end of the block would drop a new adapter. But this also keeps the
        # block from switching back, so that is done here
        undo.keep()
        switch_to(model, active.name)


# Adapt a model as a file says


def _has_no_layers_yet(view: View) -> bool:
    """Whether a model is plain, or its active adapter is new: :func:`.activate` makes one without layers."""
    return not view.is_adapted or not view.adapter.layers


def _adapt_as_file_says(view: View, config: LoRAConfig, name: str | None) -> None:
    """Adapt the layers that a file's configuration selects.

    ``name`` is for the adapter of a plain model. An adapter without layers has a name.
    """
    if view.is_adapted:
        name = view.adapter.name
    elif name is None:
        name = "default"
    inject_from_file(view.model, config, name=name)
    view.look_again()


def _with_values_of_base(
    view: View, stored: StoredAdapters, *, is_new: bool
) -> StoredAdapters:
    """Add what files of other libraries do not hold, because it is the base's. What they hold stays.

    ``is_new``: whether the model was adapted as the file says, just before.
    """
    if stored.names_its_base:
        return stored
    state = {
        **_base_values_of_trained(view, is_new=is_new),
        **_frozen_in_adapters(view),
        **stored.state,
    }
    return replace(stored, state=state)


def _base_values_of_trained(view: View, *, is_new: bool) -> dict[str, Tensor]:
    """The base's values of what trains in full here, for a file that may lack these.

    A model that was adapted as the file says (``is_new``) trains just what that file
    selects, and the base's values complete it. If the model was adapted before, the file
    must hold the modules that train here: otherwise it does not fit. Only biases may be
    absent. Of those that ``bias="all"`` selects here, the file may hold some or none.
    """
    names = [name for name in view.trainable_base if is_new or is_bias(name)]
    return {name: kept_or_present_value(view, name) for name in names}


def _frozen_in_adapters(view: View) -> dict[str, Tensor]:
    """The adapters' parameters that do not train: the factors from which PiSSA and the like start."""
    frozen = dict[str, Tensor]()
    for layer_name, layer in view.layers.items():
        for parameter, spec in layer.lora_specs().items():
            if not spec.role.trains:
                value = own_parameter(layer, parameter).detach()
                frozen[join(layer_name, parameter)] = value
    return frozen


# Write

BEING_WRITTEN = "lightning_lora_written"
"""In torch's notes on a state that is written here: so the model's own hook, ``before_load``, lets it pass."""


def _write_adapters(view: View, stored: StoredAdapters) -> None:
    """Write adapters that have been checked, and note which tensors belong to no base.

    Files of this package say this. It is noted at the end, when nothing can fail any
    more: no :class:`.Undo` would take it back.
    """
    _write_state(view, stored.state, filled=stored.filled_in_state)
    if stored.names_its_base:
        # these include the filled buffers, which the base's record notes too
        view.adapter.of_no_base = tuple(stored.of_no_base)
        view.record.base.note_filled(stored.filled_in_state)


def _write_state(view: View, state: StateDict, filled: Iterable[str] = ()) -> None:
    """Write a state that has been checked. If a module's own loading fails, restore the old values.

    Each step leaves with ``undo`` what takes it back. After an error, the last step is
    taken back first. So the old values are loaded last, when all buffers have their old
    sizes and dtypes again.

    Args:
        view: The model.
        state: The values.
        filled: The buffers in the state that hooks have filled where it comes from.
            The model may have filled others.
    """
    filled_anywhere = {*filled, *view.record.base.filled}
    values_of_filled = only(state, filled_anywhere)
    with Undo() as undo:
        _remember_old_values(view, state, undo)
        # before the state's values take the place of these
        _keep_base_of_frozen(view, state, undo)
        # before the load: torch copies into a buffer as it is, which must be of the same
        # size, and rounds to its dtype
        _fit_filled_buffers(view, values_of_filled, undo)
        # before the load: modules with code of their own for it see these values there
        restore_originals(view, _left_to_the_base(view, state), undo)
        load_state_dict(view.model, state, notes=[BEING_WRITTEN])
        # after the load: this takes digests of the values that are there now
        view.record.note_adapter_loaded(base_values(view))
        undo.keep()


def _remember_old_values(view: View, state: StateDict, undo: Undo) -> None:
    """Copy all tensors of a model that may be written, to be loaded again after an error."""
    written = {*state, *view.adapter.originals}
    present = of_type(state_dict(view.model), Tensor)
    old_values = copies_of(only(present, written))
    undo.callback(load_state_dict, view.model, old_values, notes=[BEING_WRITTEN])


def _keep_base_of_frozen(view: View, state: StateDict, undo: Undo) -> None:
    """Keep the base's values of the frozen weights that get others."""
    adapter = view.adapter
    undo.callback(setattr, adapter, "originals", dict(adapter.originals))
    keep_frozen(view, only(view.frozen_base, state))


def _fit_filled_buffers(view: View, values: StateDict, undo: Undo) -> None:
    """Give buffers that hooks filled these values, with their sizes.

    Another run may have filled a buffer with more values, or in a wider dtype.
    """
    for name, value in values.items():
        buffer = view.buffers[name]
        undo.callback(replace_values, buffer, buffer.data)
        dtype = _dtype_for(value, buffer)
        replace_values(buffer, value.to(buffer.device, dtype, copy=True))


def _dtype_for(value: Tensor, buffer: Tensor) -> torch.dtype:
    """The dtype in which a buffer takes a value: so wide that nothing is rounded.

    But a dtype of one or two bytes stays: the code of a model in half precision may
    compute in nothing else.
    """
    if buffer.dtype.itemsize <= 2:
        return buffer.dtype
    return torch.promote_types(buffer.dtype, value.dtype)


def _left_to_the_base(view: View, state: StateDict) -> Iterable[str]:
    """The names of tensors that get the base's values: kept, not trained, not in a state."""
    return names_not_in(view.adapter.originals, {*state, *view.trainable_base})

"""State dicts: one that is put back on a model, and those that other code lets torch load into one.

Torch keeps notes in a state dict, as its ``_metadata``: for each module a dict, by the
module's name, such as ``{"": {...}, "encoder": {"version": 1}}``. Files keep the notes
too. When torch loads a state, a hook of a module gets the notes on that module. So the
notes on the model itself, whose name is ``""``, say which adapters a state dict holds.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lora.errors import LoRAError
from lightning_lora.model.plain_state_dicts import note_plain_state
from lightning_lora.model.start_call import record_of, start_call
from lightning_lora.private import STATE_NOTES
from lightning_lora.storage.checksum import Description, checksum
from lightning_lora.storage.load.put import BEING_WRITTEN, put, put_state
from lightning_lora.storage.state import without_hints
from lightning_lora.storage.stored import KEY, StoredAdapters
from lightning_lora.tensors.plain_states import StateDict

# Entries of torch's notes on the model itself. They are plain types: torch reads
# nothing else from files
_ADAPTERS_ALONE = KEY  # the description of a state dict of adapters
# of a merged model: (checksum of its state, description of its adapters, adapters)
_BESIDE_MERGED = f"{KEY}_whole"


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write back what ``adapter_state_dict`` returned.

    Everything is checked before anything is written. Buffers, and other tensors that
    may change, get the base's values if they are not in ``state``. A merged model is
    merged again with the new adapters.

    Args:
        model: A model that is adapted in the same way as the one that ``state`` is
            from.
        state: Tensors by name.

    Raises:
        AdapterMismatchError: a name is missing or unexpected, or a tensor is of another
            shape or kind. Then nothing was written.
        AdapterFileError: a tensor holds NaN or infinite values.
        AdapterStateError: ``model`` has no adapters.
    """
    put_state(model, without_hints(state))


# What torch loads


def before_load(
    model: nn.Module, state: dict[str, Any], prefix: str, notes: Mapping[str, Any]
) -> None:
    """Do what comes before torch loads a state dict into a model with a record.

    A state that this package is writing passes as it is. If torch's notes say which
    adapters a state holds, they are put on the model now, and torch loads what the
    model holds then. Any other state is a plain one: that it is loaded is noted.

    Args:
        model: The model.
        state: The state dict, which may be that of a model around it.
        prefix: Where the model's own names begin in it.
        notes: Torch's notes on the model, in the state dict.
    """
    if BEING_WRITTEN in notes:
        return
    # refuse a call that may not start now, whatever the state holds
    start_call(model, "load_state_dict")
    were_put = _put_noted(model, state, notes)
    if were_put:
        state.clear()
        state.update(model.state_dict())
    else:
        note_plain_state(model, state, prefix, notes)


def note_adapters(state: Any, description: Description) -> None:
    """Describe the adapters of a state dict in torch's notes on the model: :func:`before_load` reads them."""
    setattr(state, STATE_NOTES, {"": {_ADAPTERS_ALONE: description}})


def note_adapters_beside(
    merged: Any, description: Description, adapters: StateDict
) -> None:
    """Note the adapters of a merged state dict in torch's notes, as :func:`note_adapters` does."""
    notes = getattr(merged, STATE_NOTES)
    notes[""] = {
        **notes.get("", {}),
        _BESIDE_MERGED: (checksum(merged, {}), description, adapters),
    }


def _put_noted(model: nn.Module, state: StateDict, notes: Mapping[str, Any]) -> bool:
    """Put the adapters that torch's notes describe, if they do.

    Return whether they were put.
    """
    if _BESIDE_MERGED in notes:
        return _put_beside_merged(model, state, notes)
    if _ADAPTERS_ALONE not in notes:
        return False
    _put_described(model, state, notes[_ADAPTERS_ALONE])
    return True


def _put_beside_merged(
    model: nn.Module, state: StateDict, notes: Mapping[str, Any]
) -> bool:
    """Put the adapters of a merged model, so that training goes on with them. Return whether they were put.

    They are not put in three cases. Then torch loads the merged weights, as the base of
    this model:

    1. The model's own adapters are fresh. Whoever loads a merged model before a new
       training wants to train on top of it.
    2. Other code has changed the merged weights: its values would be lost.
    3. The adapters do not fit: another model has them, or another base, or they hold
       NaN.
    """
    checksum_when_merged, description, adapters = notes[_BESIDE_MERGED]
    is_fresh = not record_of(model).adapter.may_have_learned
    if is_fresh:
        return False
    was_changed = checksum(state, {}) != checksum_when_merged
    if was_changed:
        return False
    try:
        _put_described(model, adapters, description)
    except LoRAError:
        return False
    return True


def _put_described(
    model: nn.Module, state: StateDict, description: Description
) -> None:
    """Put adapters as their description says."""
    stored = StoredAdapters.from_description(without_hints(state), description, "")
    put(model, stored, call="load_state_dict")

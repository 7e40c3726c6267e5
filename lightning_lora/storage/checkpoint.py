"""Trainer checkpoints: adapter-only when written, completed when read."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterMismatchError, BaseMismatchError
from lightning_lora.model.base_values import base_values
from lightning_lora.model.untrained.of_no_base import names_of_no_base
from lightning_lora.model.view import View, view_of
from lightning_lora.private import tree_map
from lightning_lora.storage.beside_adapters import ADAPTERS, SHOWN
from lightning_lora.storage.checksum import Description
from lightning_lora.storage.formats.lightning import AVERAGE, MOVED
from lightning_lora.storage.load.from_state_dicts import (
    note_adapters,
    note_adapters_beside,
)
from lightning_lora.storage.load.full_states import load_base
from lightning_lora.storage.load.put import put
from lightning_lora.storage.merged_state import merged_state
from lightning_lora.storage.same_base.base_changes import fingerprints_noting_changes
from lightning_lora.storage.same_base.stored_fingerprints import with_half_digests
from lightning_lora.storage.state import (
    copies_of,
    hint_for,
    values_to_store,
    without_hints,
)
from lightning_lora.storage.stored import KEY, StoredAdapters
from lightning_lora.tensors.dicts import only, renamed, where, without
from lightning_lora.tensors.names import plain_name
from lightning_lora.tensors.plain_states import StateDict
from lightning_lora.tensors.shards import full_tensors
from lightning_lora.tensors.values import detached

Checkpoint = dict[str, Any]  # as a Trainer writes it

_STATES = ("state_dict", MOVED)  # the entries that hold a state of the model
_CALL = "To load a checkpoint"  # what errors say of the call


# Write


def adapter_only(
    model: nn.Module,
    checkpoint: Checkpoint,
    metrics: dict[str, float],
    *,
    written_later: bool = False,
) -> Checkpoint:
    """Return a checkpoint to be written: of the model, it holds only what training changed, and a description.

    Args:
        model: The model.
        checkpoint: All that a Trainer would write.
        metrics: What the run has logged, for the description.
        written_later: Whether training may go on before the file is written. Then it
            gets copies.
    """
    view = view_of(model)
    # first, because a small state holds what has changed in the base
    fingerprints = fingerprints_noting_changes(view, anew=False)
    small = _with_small_states(view, checkpoint)
    if view.is_sharded:
        small = full_tensors(small)
    if written_later:
        small = _copy(small)
    stored = StoredAdapters.from_view(
        view, small["state_dict"], with_half_digests(view, fingerprints)
    )
    description = replace(stored, metrics=metrics).description()
    return _with_description(view, small, description)


def _with_description(
    view: View, checkpoint: Checkpoint, description: Description
) -> Checkpoint:
    """A checkpoint with the description of its adapters, and a hint for readers without this package.

    The description stands in the entry of this package, and in torch's notes on the
    state, for code that loads the state alone.
    """
    hint = hint_for(view)
    state: Any = OrderedDict({**checkpoint["state_dict"], hint: torch.empty(0)})
    note_adapters(state, description)
    # 0.2.0 does not know this hint by its name, but takes out what is called shown
    return {**checkpoint, "state_dict": state, KEY: {**description, SHOWN: {hint}}}


def with_merged_model(
    model: nn.Module, checkpoint: Checkpoint, *, written_later: bool = False
) -> tuple[Checkpoint, dict[str, float]]:
    """Return a checkpoint of :func:`adapter_only` with the whole merged model as its state, for any code.

    The adapters go into the entry of this package. Also return the share of each
    layer's update that is lost to rounding.
    """
    adapters = without_hints(checkpoint["state_dict"])
    description = without(checkpoint[KEY], [SHOWN])
    merged, lost = merged_state(view_of(model), adapters)
    if written_later:
        merged = deepcopy(merged)
    note_adapters_beside(merged, description, adapters)
    whole = {
        **checkpoint,
        "state_dict": merged,
        KEY: {**description, ADAPTERS: adapters},
    }
    return whole, lost


def _with_small_states(view: View, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint whose states of the model hold only what training changed: its own, and averages in callbacks."""
    small = dict(checkpoint)
    for key, state in only(checkpoint, _STATES).items():
        small[key] = _small_state(view, state)
    for callback, state in _callbacks_with_average(checkpoint).items():
        small_average = _small_state(view, state[AVERAGE])
        small["callbacks"] = {
            **small["callbacks"],
            callback: {**state, AVERAGE: small_average},
        }
    return small


def _small_state(view: View, state: StateDict) -> dict[str, Any]:
    """What files hold of a state of the model, without memory of other tensors."""
    values = values_to_store(view, state, names_of_no_base(view))
    return {name: _alone(value) for name, value in values.items()}


def _callbacks_with_average(checkpoint: Checkpoint) -> dict[str, Any]:
    """The states of callbacks that hold an average of the model, such as Lightning's StochasticWeightAveraging."""
    return where(checkpoint.get("callbacks", {}), _has_average)


def _has_average(state: object) -> bool:
    """Whether a callback's state holds a state of the model: an average of it."""
    return isinstance(state, Mapping) and isinstance(state.get(AVERAGE), Mapping)


def _alone(value: Any) -> Any:
    """Copy a tensor that shares a larger memory: torch would write all of that memory into the file."""
    if (
        not isinstance(value, Tensor)
        or value.is_meta
        or value.layout is not torch.strided
    ):
        return value
    if value.untyped_storage().nbytes() == value.numel() * value.element_size():
        return value
    return value.clone(memory_format=torch.contiguous_format)


def _copy(checkpoint: Checkpoint) -> Any:
    """A copy that later steps do not change. torch copies no tensor with a graph, such as a kept loss."""
    return deepcopy(tree_map(detached, checkpoint))


# Read


def complete_averages(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put the base's values back into averages that :func:`adapter_only` made small."""
    for state in _callbacks_with_average(checkpoint).values():
        base = base_values(view_of(model))
        state[AVERAGE] = _with_base(model, state[AVERAGE], base)


@contextmanager
def naming_the_file(path: object) -> Iterator[None]:
    """Say which file does not fit: with ``ckpt_path="last"`` or ``"best"``, Lightning has found it."""
    try:
        yield
    except BaseMismatchError as error:
        raise BaseMismatchError(f"{path}: {error}") from error
    except AdapterMismatchError as error:
        raise AdapterMismatchError(
            f"{path}: {error} If another run wrote this file, pass this run's own as "
            "ckpt_path, or none to begin anew."
        ) from error


def load_checkpoint_state(
    model: nn.Module, checkpoint: Checkpoint, *, completes_states: bool = False
) -> None:
    """Load a Trainer checkpoint into an adapted model.

    The weights of a full checkpoint become the base.

    Args:
        model: The model.
        checkpoint: The checkpoint, whose state holds adapters alone, or a full model.
        completes_states: Whether callbacks read the states in it: these get the base's
            values too.
    """
    state = checkpoint["state_dict"]
    if KEY not in checkpoint:
        load_base(model, state, call=_CALL)
        return
    load_stored(model, StoredAdapters.from_description(state, checkpoint[KEY], ""))
    if completes_states:
        _add_base_to_states(model, checkpoint)


def load_stored(model: nn.Module, stored: StoredAdapters) -> None:
    """Load adapters into an adapted model, whose base the stage or the end of a fit has just read."""
    put(model, stored, call=_CALL, reads_base_anew=False)


def _add_base_to_states(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Add the base's values to the states of the model in a checkpoint."""
    base = copies_of(base_values(view_of(model)))
    for key, state in only(checkpoint, _STATES).items():
        checkpoint[key] = _with_base(model, state, base)


def _with_base(
    model: nn.Module, state: StateDict, base: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Add the base's values to a state, in the model's order and with its names: callbacks may rely on both.

    Entries that the model does not have come last.
    """
    values = {**base, **renamed(where(state, _is_not_none), plain_name)}
    completed = dict[str, Any]()
    for name in model.state_dict(keep_vars=True):
        if plain_name(name) in values:
            completed[name] = values.pop(plain_name(name))
    return {**completed, **values}


def _is_not_none(value: object) -> bool:
    """Whether an entry of a state has a value."""
    return value is not None

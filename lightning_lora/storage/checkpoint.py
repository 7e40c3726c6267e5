"""Trainer checkpoints: adapter-only when written, completed when read."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base.base_tensors import Change
from lightning_lora.errors import AdapterMismatchError, BaseMismatchError, LoRAError, listed
from lightning_lora.model.base_values import base_values
from lightning_lora.model.blocks import refuse_in_block
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.merge import unmerged
from lightning_lora.model.record import on_load, record_of
from lightning_lora.model.view import View, view_of
from lightning_lora.private import STATE_NOTES, tree_map
from lightning_lora.storage.apply import check_fits, write_state
from lightning_lora.storage.fingerprint import base_tensors, fingerprint, have_one_form, note_changed, with_halves
from lightning_lora.storage.formats.lightning import AVERAGE, MOVED
from lightning_lora.storage.formats.own import ADAPTERS, leave_adapters
from lightning_lora.storage.merged_model import merged_state, take_updates_out
from lightning_lora.storage.state import NOTE, without_base, without_notes
from lightning_lora.storage.stored import KEY, StoredAdapters, checksum
from lightning_lora.tensors.names import load_state_dict, plain_name, state_dict
from lightning_lora.tensors.shards import full_tensors, is_dtensor

_WHOLE = f"{KEY}_whole"  # in torch's notes on a merged state: its checksum, and the adapters


def adapter_only(model: nn.Module, checkpoint: dict[str, Any], *, written_later: bool = False) -> dict[str, Any]:
    """Return ``checkpoint`` to be written: of the model, it holds only what training changed, and a description."""
    fingerprints, view = note_changed(model, anew=False), view_of(model)
    held = dict(checkpoint)
    for key in ("state_dict", MOVED):
        if key in held:
            held[key] = _small(view, held[key])
    if "callbacks" in held:
        held["callbacks"] = dict(held["callbacks"])
        for key, own in held["callbacks"].items():
            if _has_average(own):
                held["callbacks"][key] = {**own, AVERAGE: _small(view, own[AVERAGE])}
    if any(map(is_dtensor, view.parameters.values())):
        held = full_tensors(held)
    if written_later:
        # torch copies no tensor with a graph, such as a kept loss
        held = deepcopy(tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, held))
    about = StoredAdapters.from_view(view, held["state_dict"], with_halves(view, fingerprints)).description()
    state: Any = OrderedDict({NOTE: torch.empty(0), **held["state_dict"]})
    setattr(state, STATE_NOTES, {"": {KEY: about}})  # for the module itself, if other code loads it
    return {**held, "state_dict": state, KEY: about}


def with_merged_model(
    model: nn.Module, checkpoint: Mapping[str, Any], *, written_later: bool = False
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return a checkpoint with the whole merged model, for any code. The adapters are in the entry of this package."""
    state = without_notes(checkpoint["state_dict"])
    merged, lost = merged_state(view_of(model), state)
    held: Any = {"state_dict": deepcopy(merged) if written_later else merged}
    notes = getattr(held["state_dict"], STATE_NOTES)  # for the module itself, as above
    notes[""] = {**notes.get("", {}), _WHOLE: (checksum(merged, {}), checkpoint[KEY], state)}
    return {**checkpoint, **held, KEY: {**checkpoint[KEY], ADAPTERS: state}}, lost


def _small(view: View, state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _alone(value) for name, value in without_base(view, state, random_weights(view)).items()}


def _has_average(own: object) -> bool:
    """Whether a callback's own state holds a full model. That of Lightning's StochasticWeightAveraging does."""
    return isinstance(own, Mapping) and isinstance(own.get(AVERAGE), Mapping)


def _alone(value: Any) -> Any:
    """Copy a tensor that shares a larger memory: torch would write all of that memory into the file."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return value
    exact = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if exact else value.clone(memory_format=torch.contiguous_format)


def complete_averages(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put the base's values back into averages that :func:`adapter_only` made small."""
    for own in checkpoint.get("callbacks", {}).values():
        if _has_average(own):
            own[AVERAGE] = _completed(model, own[AVERAGE], base_values(view_of(model)))


def find_base_in(model: nn.Module, merged: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> bool:
    """Make the base from a checkpoint's merged weights. Code without adapters loads these before it resumes a run."""
    if not merged:
        return False
    here = fingerprint(view := view_of(model), anew=False)
    fitting = [each for each in checkpoint[KEY]["base"] if have_one_form(each, here)]
    if not fitting or not take_updates_out(view, merged, checkpoint["state_dict"]):
        return False
    now = fingerprint(view, anew=False)
    for name, own, base in zip(base_tensors(view), now["digests"], fitting[0]["digests"], strict=True):
        if own != base:
            view.record.base.row(name).rounding = Change(own, base)
    return True


@contextmanager
def naming_the_file(path: object) -> Iterator[None]:
    """Say which file does not fit: with ``ckpt_path="last"`` or ``"best"``, Lightning has found it."""
    try:
        yield
    except (AdapterMismatchError, BaseMismatchError) as error:
        raise type(error)(
            f"{path}: {error} Or did another run write this file? Then pass the path of this run's "
            "own file (ckpt_path), or none to begin anew."
        ) from error


def load_checkpoint_state(model: nn.Module, checkpoint: dict[str, Any], *, whole: bool = False) -> None:
    """Load a Trainer checkpoint into an adapted model. The weights of a full checkpoint become the base."""
    refuse_in_block(model, "To load a checkpoint")
    leave_adapters(checkpoint)  # the strategy's own method does not
    state = checkpoint["state_dict"]
    if KEY not in checkpoint:
        _load_base(model, state)
        return
    view = view_of(model)
    stored = StoredAdapters.from_file(state, checkpoint[KEY], "")
    check_fits(view, stored, anew=False)  # the stage or the end of fit has just read the base
    if whole:
        base = {name: value.detach().clone() for name, value in base_values(view).items()}
        for key in ("state_dict", MOVED):
            if key in checkpoint:
                checkpoint[key] = _completed(model, checkpoint[key], base)
    write_state(model, state)


@on_load
def _load_described(model: nn.Module, state: dict[str, Any], _: str, notes: Mapping[str, Any]) -> bool:
    """Load the adapters of a file that other code loads into the model. torch then gets the model's own state."""
    number, about, held = notes.get(_WHOLE, (None, notes.get(KEY), state))
    is_whole = number is not None
    if about is None or (is_whole and not (View(model).adapter.is_trained and checksum(state, {}) == number)):
        return False  # it is loaded as it is: before training, or as other code has made it
    held = without_notes(held)
    try:
        with unmerged(model):
            check_fits(view_of(model), StoredAdapters.from_file(held, about, ""))
            write_state(model, held)
    except LoRAError:
        if is_whole:  # of another model: it is loaded as a plain one
            return False
        raise
    state.clear()
    state.update(model.state_dict())
    return True


def _completed(model: nn.Module, state: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Any]:
    """Add the base's values to a state, and use the model's own names and order."""
    held = {**base, **{plain_name(name): value for name, value in state.items() if value is not None}}
    own = {plain_name(name): name for name in model.state_dict(keep_vars=True)}
    order = {**{name: None for name in own if name in held}, **held}  # callbacks may rely on the model's order
    return {own.get(name, name): held[name] for name in order}


def _load_base(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a full state into the base, and initialise the adapters again."""
    state = {plain_name(name): value for name, value in state.items()}
    _check_base_fits(model, state)
    with unmerged(model):
        for layer in View(model).layers.values():
            layer.lora_initialise()
        load_state_dict(model, state)
        View(model).begin_anew()
    record = record_of(model)
    record.adapter.fingerprints, record.adapter.is_trained = [], False
    record.base.forget_changes()


def _check_base_fits(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a full state that does not fit this model."""
    adapters = set(map(id, view_of(model).adapters.values()))
    expected = {name: p for name, p in state_dict(model, keep_vars=True).items() if id(p) not in adapters}
    wrong = [*(f"{name} is missing" for name in expected if name not in state)]
    for name, value in state.items():
        own = expected.get(name)
        if name not in expected:
            wrong.append(f"{name} is unexpected")
        elif isinstance(value, Tensor) and isinstance(own, Tensor) and value.shape != own.shape:
            wrong.append(f"{name} has another shape")
    if wrong:
        raise BaseMismatchError(
            f"This checkpoint has no adapters of this package, and as a base it does not fit {type(model).__name__}: "
            f"{listed(wrong)}. Pass a checkpoint of the same model, trained with or without LoRACallback."
        )

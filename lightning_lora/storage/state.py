"""Read what training changed, and write it back.

Everything is checked before anything is written.
"""

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, listed
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.merge import check_as_merged, unmerged
from lightning_lora.model.view import View, keep_frozen, restore_originals, view_of
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import load_state_dict, plain_name, state_dict
from lightning_lora.tensors.shards import full_tensor, is_dtensor
from lightning_lora.tensors.values import same_bits

_NOTE_START = "this file holds only adapters"

NOTE = (
    f"{_NOTE_START}: load it with lightning_lora.load_from_checkpoint(cls, path), or into a model with "
    "lightning_lora.load_adapter(model, path); or give the Trainer a LoRACallback(); or write files that any code "
    "loads: LoRACallback(save='model')"
)
"""An entry of a checkpoint's state, without values. Whoever loads the file as a full one is told this name."""


def adapter_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return everything that training changed, and nothing else.

    These are the adapters, and the biases and modules that train in addition to them. Buffers and frozen weights are
    included if they no longer have the base's values. Everything that a module's own code adds to its state dict is
    included too. Of a model that is spread over processes, each process must call it, and gets whole tensors.

    Args:
        model: A model with adapters: on its layers, or merged by ``merge_adapters`` or a finished fit.

    Returns:
        Tensors by the names they have in the state dict of the adapted model.

    Raises:
        AdapterStateError: ``model`` has no adapters.

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> list(adapter_state_dict(model))
        ['0.lora_A', '0.lora_B']
    """
    check_as_merged(model)
    view = view_of(model)
    state = without_base(view, state_dict(model), random_weights(view))
    return {name: full_tensor(value) for name, value in state.items()}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write back what ``adapter_state_dict`` returned.

    Everything is checked before anything is written. Buffers, and other tensors that may change, get the base's values
    if they are not in ``state``. A merged model is merged again with the new adapters.

    Args:
        model: A model that is adapted in the same way as the one that ``state`` is from.
        state: Tensors by name.

    Raises:
        AdapterMismatchError: a name is missing or unexpected, or a tensor is of another shape or kind. Then nothing
            was written.
        AdapterStateError: ``model`` has no adapters.
    """
    check_as_merged(model)
    view = view_of(model)
    entries = entries_of(view, random_weights(view))
    state = {name: value for name, value in state.items() if not is_note(name)}
    check_names(view, entries, state)
    check_tensors(view, entries, state)
    write_state(model, state)


def is_note(name: object) -> bool:
    """Whether an entry is the note, of any version."""
    return isinstance(name, str) and name.startswith(_NOTE_START)


def without_base(view: View, state: Mapping[str, Any], random: Collection[str] = ()) -> dict[str, Any]:
    """Remove the base's values from a state of the model.

    These are frozen weights, and buffers with the same values as in the base. Frozen weights that code other than an
    optimizer changed are kept, or added, and so are those in ``random``, which look untrained. Missing trained tensors
    are added too, because user code may drop everything that it considers the base.
    """
    record, trained = view.record, view.trained
    originals = {name: value for name, value in record.originals.items() if name not in trained}
    dropped = {*view.frozen, *view.entries, *_aliases(view)}
    values = view.frozen_values
    added = {*record.changed, *originals, *random}
    held: dict[str, Any] = {name: value.detach() for name, value in values.items() if name in added}
    for name, value in state.items():
        name = plain_name(name)
        if name not in dropped:
            held[name] = value
    kept: dict[str, Any] = {name: p.detach() for name, p in _required(view).items()}
    for name, value in held.items():
        is_own = isinstance(value, Tensor) and not is_dtensor(value)
        if name in originals and name not in random and is_own and same_bits(value.detach(), originals[name]):
            continue
        kept[name] = value
    for name in trained:
        if name in held and view.parameters[name] is not trained[name]:  # tied and merged: its other use trains
            kept[name] = trained[name].detach()
    return kept


def _aliases(view: View) -> set[str]:
    """The further names of adapters on shared layers."""
    ids = {id(p) for p in view.adapters.values()}
    return {name for name, p in view.parameters.items() if id(p) in ids and name not in view.adapters}


def write_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a state that has been checked."""
    view = view_of(model)
    keep_frozen(view, [name for name in state if name in view.frozen])
    with unmerged(model):
        now = View(model)
        _write(now, state)
        now.record.is_trained = True
        changed = now.record.changed
        for name, (_, was) in changed.items():
            changed[name] = (digest(now.base[name]), was)


def _write(view: View, state: Mapping[str, Any]) -> None:
    """Write into an adapted model. If a module's own loading fails, restore the old values."""
    model, originals = view.model, view.record.originals
    before = {}
    for name, value in state_dict(model).items():
        if isinstance(value, Tensor) and (name in state or name in originals):
            before[name] = value.clone()
    with ExitStack() as undo:
        undo.callback(load_state_dict, model, before)
        restore_originals(view, [name for name in originals if name not in state and name not in view.trained], undo)
        load_state_dict(model, state)
        undo.pop_all()


# Checks


class Entries(NamedTuple):
    """The entries of a model's stored state.

    Args:
        required: Entries that must be there: adapters, and everything else that trains.
        optional: Entries that may be there: buffers, frozen weights that changed, and everything that a module's own
            code adds to its state.
    """

    required: dict[str, Tensor]
    optional: dict[str, Any]


def entries_of(view: View, random: Collection[str] = ()) -> Entries:
    """Return the entries of an adapted model's stored state.

    Weights in ``random``, which look untrained, are optional.
    """
    now = without_base(view, state_dict(view.model), random)
    return Entries(_required(view), {**now, **view.buffers, **view.kept})


def _required(view: View) -> dict[str, Tensor]:
    return {**view.adapters, **view.trained}


def check_names(
    view: View,
    entries: Entries,
    state: Mapping[str, Any],
    changed: Collection[str] = (),
    config: LoRAConfig | None = None,
) -> None:
    """Refuse a state with missing or unexpected names.

    Args:
        view: The adapted model.
        entries: The entries of its stored state.
        state: The state to be written into it.
        changed: Names of frozen weights for which ``state`` has new values.
        config: The configuration with which ``state`` was trained, if known.

    Raises:
        AdapterMismatchError: names are missing or unexpected.
    """
    required = dict.fromkeys([*entries.required, *(name for name in changed if name in view.base)])
    wrong = {
        "missing": [name for name in required if name not in state],
        "unexpected": [name for name in state if name not in required and name not in entries.optional],
    }
    if not any(wrong.values()):
        return
    found = " and ".join(f"{what} {listed(names)}" for what, names in wrong.items() if names)
    trained = f"with {_selecting(config)}" if config else "with the same targets, modules_to_save and bias"
    raise AdapterMismatchError(
        f"These adapters do not fit {type(view.model).__name__}: {found}. Adapt the model as they were trained: "
        f"{trained}."
    )


def _selecting(config: LoRAConfig) -> str:
    """The arguments that decide what trains, without those at their defaults."""
    default = LoRAConfig()
    shown = [f"target_modules={_as_list(config.target_modules)!r}"]
    for name in (
        "target_slices",
        "target_parameters",
        "exclude_modules",
        "modules_to_save",
        "bias",
        "init",
        "use_dora",
    ):
        value = getattr(config, name)
        if value != getattr(default, name):
            shown.append(f"{name}={_as_list(value)!r}")
    return ", ".join(shown)


def _as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def check_tensors(view: View, entries: Entries, state: Mapping[str, Any], *, converting: bool = False) -> None:
    """Refuse tensors of another shape or kind than the model's.

    The names in ``state`` must have been checked before.

    Args:
        view: The adapted model.
        entries: The entries of its stored state.
        state: The state to be written into it.
        converting: Allow all but the adapters to be rounded, as ``model.to(dtype)`` rounds the rest of the model.

    Raises:
        AdapterMismatchError: there is such a tensor.
    """
    known = {**view.base, **entries.optional, **entries.required}
    for name, value in state.items():
        if isinstance(known[name], Tensor):
            _check_tensor(name, value, known[name], converting=converting and name not in view.adapters)


def _check_tensor(name: str, value: object, expected: Tensor, *, converting: bool) -> None:
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise AdapterMismatchError(
            f"{name!r} is {found}, but this model has {tuple(expected.shape)}. Build the model as it was built for "
            "training, with the same head, and adapt it with the same r."
        )
    if value.layout != expected.layout or (value.is_meta and not expected.is_meta):
        raise AdapterMismatchError(
            f"{name!r} has no values that could be written (it is {value.layout}, {value.device})."
        )
    are_floats = value.is_floating_point() and expected.is_floating_point()
    if converting and are_floats and torch.equal(value.isfinite(), value.to(expected.dtype).isfinite()):
        return
    if torch.promote_types(value.dtype, expected.dtype) != expected.dtype or (
        value.is_floating_point() != expected.is_floating_point()
    ):
        raise AdapterMismatchError(
            f"{name!r} is {value.dtype}, but this model has {expected.dtype}, which cannot hold the same values. "
            f"Convert the model first: model.to({value.dtype})."
        )

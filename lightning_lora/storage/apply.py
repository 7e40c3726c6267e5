"""Put stored adapters on a model: everything is checked before anything is written."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, listed, warn
from lightning_lora.layers import INITIALISATIONS
from lightning_lora.model.attach import undone_on_error
from lightning_lora.model.blocks import refuse_in_block
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.inject import inject
from lightning_lora.model.merge import merge, unmerge_or_forget, unmerged
from lightning_lora.model.merged import check_as_merged
from lightning_lora.model.record import find_record, keep_record
from lightning_lora.model.switch import activate, set_adapter
from lightning_lora.model.view import View, keep_frozen, restore_originals, root_of, view_of
from lightning_lora.storage.base_check import check_base
from lightning_lora.storage.fingerprint import base_value
from lightning_lora.storage.renaming import find_renamings, renamed_config
from lightning_lora.storage.state import diverged, required, without_base, without_notes
from lightning_lora.storage.stored import DIVERGED, StoredAdapters
from lightning_lora.storage.stored_layers import asked_of, bare
from lightning_lora.tensors.names import is_inside, join, load_state_dict, own_parameter, owner_of, state_dict
from lightning_lora.tensors.values import replace_values


def apply(
    model: nn.Module, read: Callable[[View], StoredAdapters], *, refuse_base: bool = True, name: str | None = None
) -> None:
    """Put what ``read`` returns on a model as the adapter ``name``, or the active one. An error changes nothing.

    A model without adapters is adapted first. Beside the active one, another one is loaded, and rests.
    """
    refuse_in_block(model, "load_adapter")
    record = find_record(model)
    if record is not None and name not in (None, record.adapter.name):
        before = record.adapter
        with unmerged(model), activate(model, name, before.config) as undo:
            apply(model, read, refuse_base=refuse_base)
            undo.pop_all()
            set_adapter(model, before.name)
        return
    with _unmerged_and_undone(model) as view:
        stored, is_new = read(view), not (view.is_adapted and view.adapter.layers)
        if is_new:  # no adapters, or only those of a submodule
            known = view.adapter.name if view.is_adapted else name
            inject(model, stored.config, name="default" if known is None else known, networks_are_known=True)
        view = view_of(model)
        if not stored.base:
            stored = replace(stored, state=_completed(view, stored.state, is_new=is_new))
        check_fits(view, stored, refuse_base=refuse_base)
        _write(view, stored.state)


@contextmanager
def _unmerged_and_undone(model: nn.Module) -> Iterator[View]:
    """Unmerge a model for a change. Undo all of it after an error."""
    record, was_merged = find_record(model), False
    try:
        was_merged = unmerge_or_forget(model)
        with undone_on_error(view := View(model)):
            yield view
    except BaseException:
        if was_merged:
            merge(model)
        elif record is not None and record.is_merged:  # its weights were replaced: it is as it was
            keep_record(model, record)
        raise


def _completed(view: View, state: Mapping[str, Any], *, is_new: bool) -> dict[str, Any]:
    """Add what files of other libraries do not hold: base values of what trains, and start values from the base."""
    added = {n: base_value(view, n) for n in view.trained if is_new or "bias" in n.rpartition(".")[2]}
    for name, layer in view.layers.items():
        for parameter, about in layer.lora_roles().items():
            if not about.role.trains:
                added[join(name, parameter)] = own_parameter(layer, parameter).detach()
    return {**added, **state}


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
    view = view_of(model)
    refuse_in_block(model, "load_adapter_state_dict")
    check_as_merged(view)
    state = without_notes(state)
    _check_names(view, random_weights(view), state)
    _check_tensors(view, state)
    write_state(model, state)


def write_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a state that has been checked."""
    with unmerged(model):
        _write(view_of(model), state)


def _write(view: View, state: Mapping[str, Any]) -> None:
    """Write into a model that is not merged. If a module's own loading fails, restore the old values."""
    keep_frozen(view, [name for name in state if name in view.frozen])
    model, originals, before = view.model, view.adapter.originals, {}
    for name, value in state_dict(model).items():
        if isinstance(value, Tensor) and (name in state or name in originals):
            before[name] = value.clone()
    with ExitStack() as undo:
        undo.callback(load_state_dict, model, before)
        for name in state.keys() & view.record.filled:  # they may have another shape here, and a dtype that would round
            buffer, value = view.buffers[name], state[name]
            dtype = torch.promote_types(buffer.dtype, value.dtype) if buffer.dtype.itemsize > 2 else buffer.dtype
            undo.callback(replace_values, buffer, buffer.data)
            replace_values(buffer, value.to(buffer.device, dtype, copy=True))
        restore_originals(view, [name for name in originals if name not in state and name not in view.trained], undo)
        load_state_dict(model, state)
        view.record.values_were_loaded(view.base_values)
        undo.pop_all()


# Other names


def with_names_of(view: View, stored: StoredAdapters) -> StoredAdapters:
    """Return adapters by a model's names, which may differ by one prefix. Only those of a file of this package."""
    found = find_renamings(list(stored.layers), view.modules, root_there=stored.root, root_here=root_of(view.model))
    if len(found) == 1 and all(is_inside(name, found[0].here) for name in (*view.parameters, *view.buffers)):
        stored = stored if found[0] == stored.renaming else _renamed(view, replace(stored, renaming=found[0]))
    elif places := [way.here for way in found if way.here]:
        raise AdapterMismatchError(
            f"The names in the file fit in {view.title} below {listed(places)}, and it holds other weights too. Load "
            f"the file onto that part: load_adapter(model.get_submodule({places[0]!r}), path)."
        )
    _check_present(view, stored)
    return stored


def _renamed(view: View, stored: StoredAdapters) -> StoredAdapters:
    title, renaming = view.title, stored.renaming
    outside = dict.fromkeys(owner_of(name) or name for name in stored.state if not is_inside(name, renaming.there))
    if outside:
        raise AdapterMismatchError(
            f"The file's adapters fit {title}, but it also holds {listed(outside)}, outside of {renaming.there!r}. "
            "Load it onto the whole model that it was saved from, and take this module from there."
        )
    warn(renaming.told(title))
    return replace(
        stored,
        config=renamed_config(stored.config, stored.layers.values(), renaming, view),
        state={renaming.name_here(name): value for name, value in stored.state.items()},
        changed=list(map(renaming.name_here, stored.changed)),
        random=list(map(renaming.name_here, stored.random)),
    )


def _check_present(view: View, stored: StoredAdapters) -> None:
    """Refuse a file with modules that the model lacks, before it is adapted."""
    present, title = {**view.parameters, **view.buffers}, view.title
    owners = dict.fromkeys(map(owner_of, stored.state))
    absent = [owner for owner in owners if owner not in view.modules]
    absent += [name for name in stored.state if name not in present and stored.config.is_saved(name)]
    absent += [name for name in stored.filled if name not in present and owner_of(name) in view.modules]
    if absent:
        raise AdapterMismatchError(
            f"The file does not fit {title}: it holds {listed(absent)}, which {title} does not have. Load it onto the "
            "model that it was saved from. If the module makes them in setup, call model.setup('fit') first."
        )


# Checks


def check_fits(view: View, stored: StoredAdapters, *, anew: bool = True, refuse_base: bool = True) -> None:
    """Refuse stored adapters that do not fit an adapted model."""
    config, state, is_converted = stored.config, stored.state, False
    _check_settings(view, config)
    _check_names(view, () if stored.base else view.adapter.random or (), state, stored)
    if stored.base:
        shapes = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
        is_converted = check_base(
            view, stored.base, shapes, stored.random, anew=anew, renaming=stored.renaming, refuse=refuse_base
        )
    _check_tensors(view, {n: v for n, v in state.items() if n not in stored.filled}, converting=is_converted)
    if broken := diverged(view, state):
        raise AdapterFileError(f"{listed(broken)} hold NaN or infinite values: {DIVERGED}.")
    _check_layers(view, stored)
    if lost := sorted(view.record.changed.keys() - state.keys()):
        raise BaseMismatchError(
            f"Frozen weights of {view.title} have changed in training since these adapters were stored, "
            f"and their earlier values are in no file: {listed(lost)}. Build the model anew, then load."
        )
    if stored.base:
        view.adapter.random = tuple(stored.random)
        view.record.buffers_were_filled(stored.filled)


def _check_settings(view: View, config: LoRAConfig) -> None:
    """Refuse adapters that were trained with another rank, scaling or start: they would give another update."""
    is_difference = INITIALISATIONS[config.init].is_difference
    for name, layer in view.layers.items():
        settings = layer.lora_settings
        is_same_start = settings.init == config.init or not (settings.is_difference or is_difference)
        for matrix in layer.lora_matrices:
            target, r, scaling = asked_of(config, name, matrix, layer.overlaid[0].__name__)
            here, scaled = matrix.rank(settings.r), matrix.scale(settings.scaling)
            if r != here or not math.isclose(scaling, scaled) or not is_same_start:
                start_there = "" if is_same_start else f", init={config.init!r}"
                start_here = "" if is_same_start else f", init={settings.init!r}"
                raise AdapterMismatchError(
                    f"These adapters were trained with r={r} and a scaling of {scaling:g}{start_there} in "
                    f"{target!r}; here it has r={here} and a scaling of {scaled:g}{start_here}. "
                    f"{_as_trained(view, config)} Or give the Trainer LoRACallback() alone, or call "
                    "remove_adapters(model) before load_adapter."
                )


def _check_layers(view: View, stored: StoredAdapters) -> None:
    """Refuse a file that describes other layers than the model now has."""
    for name, layer in view.layers.items():
        there = stored.layers.get(stored.renaming.name_there(name))
        if there and {*map(bare, there.matrices)} != {*map(bare, layer.lora_matrices)}:
            raise AdapterMismatchError(
                f"In {name!r}, the file adapts other rows of the weight than this model does. "
                f"{_as_trained(view, stored.config)}"
            )


def _check_names(
    view: View, random: Collection[str], state: Mapping[str, Any], stored: StoredAdapters | None = None
) -> None:
    """Refuse a state with missing or unexpected names: all that trains must be there. Changed tensors may be."""
    changed = stored.changed if stored else ()
    needed = dict.fromkeys([*required(view), *filter(view.base.__contains__, changed)])
    known = {*needed, *without_base(view, state_dict(view.model), random), *view.buffers, *view.kept}
    wrong = {
        "missing": [name for name in needed if name not in state],
        "unexpected": [name for name in state if name not in known],
    }
    if not any(wrong.values()):
        return
    found = " and ".join(f"{what} {listed(names)}" for what, names in wrong.items() if names)
    remedy = "Use the same targets, modules_to_save and bias as for the training."
    remedy = _as_trained(view, stored.config) if stored else remedy
    raise AdapterMismatchError(f"These adapters do not fit {view.title}: {found}. {remedy}")


def _as_trained(view: View, config: LoRAConfig) -> str:
    """What to do: take the arguments of the training that are others here, or the module."""
    here = view.config.to_dict()
    use = "; ".join(f"{name}={v!r}, not {here[name]!r}" for name, v in config.to_dict().items() if v != here[name])
    return f"Use the arguments of the training: {use}." if use else "Build the module as it was built for training."


def _check_tensors(view: View, state: Mapping[str, Any], *, converting: bool = False) -> None:
    """Refuse tensors of another shape or kind. ``converting``: all but adapters are rounded as ``model.to`` would."""
    known = {**view.base, **view.buffers, **required(view)}
    for name in filter(known.__contains__, state):  # a module's own code judges the others
        value, expected = state[name], known[name]
        if not isinstance(value, Tensor):
            raise AdapterMismatchError(f"{name!r} is a {type(value).__name__}. Expected a tensor.")
        if value.shape != expected.shape:
            raise AdapterMismatchError(
                f"{name!r} is {tuple(value.shape)}, but this model has {tuple(expected.shape)}. Build the model as it "
                f"was built for training, with the same sizes{' and r' if name in view.adapters else ''}."
            )
        are_floats = value.is_floating_point() and expected.is_floating_point()
        may_round = converting and name not in view.adapters and are_floats
        if may_round and torch.equal(value.isfinite(), value.to(expected.dtype).isfinite()):
            continue
        is_held = torch.promote_types(value.dtype, expected.dtype) == expected.dtype
        if not is_held or value.is_floating_point() != expected.is_floating_point():
            raise AdapterMismatchError(
                f"{name!r} is {value.dtype}, but this model has {expected.dtype}, which cannot hold the same values. "
                f"Convert the model first: model.to({value.dtype})."
            )

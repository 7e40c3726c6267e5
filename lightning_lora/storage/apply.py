"""Put stored adapters on a model.

Everything is checked before anything is written.
"""

import math
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, listed
from lightning_lora.layers import FROM_BASE, LoRAParameters
from lightning_lora.model.fresh import random_weights
from lightning_lora.model.merge import unmerged
from lightning_lora.model.merged import check_as_merged
from lightning_lora.model.view import View, keep_frozen, restore_originals, view_of
from lightning_lora.storage.base import check_base
from lightning_lora.storage.names import Renaming
from lightning_lora.storage.stored import is_note, required, stored_config, without_base
from lightning_lora.tensors.names import join, load_state_dict, state_dict


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


def write_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a state that has been checked."""
    view = view_of(model)
    keep_frozen(view, [name for name in state if name in view.frozen])
    with unmerged(model):
        now = View(model)
        _write(now, state)
        now.record.values_were_loaded(now.base)


def _write(view: View, state: Mapping[str, Any]) -> None:
    """Write into an adapted model. If a module's own loading fails, restore the old values."""
    model, originals = view.model, view.adapter.originals
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
    return Entries(required(view), {**now, **view.buffers, **view.kept})


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


def check_fits(
    view: View,
    state: Mapping[str, Any],
    description: Mapping[str, Any],
    *,
    anew: bool = True,
    renaming: Renaming | None = None,
    refuse_base: bool = True,
) -> None:
    """Refuse stored adapters that do not fit an adapted model.

    Args:
        view: The adapted model.
        state: The stored tensors, by the names of the model.
        description: What the file says of them.
        anew: Read every weight again, as for :func:`fingerprint`.
        renaming: How the names in the file became those of the model.
        refuse_base: Refuse another base. Otherwise only warn.

    Raises:
        AdapterFileError: the description cannot be read, or values are NaN or infinite.
        AdapterMismatchError: a tensor does not fit, or rank or scaling differ, which would give another update.
        BaseMismatchError: the adapters were trained on another base.
    """
    config, changed = stored_config(description), description.get("changed", ())
    entries = entries_of(view)
    _check_settings(view, config)
    check_names(view, entries, state, changed, config)
    shapes = {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}
    random = tuple(description.get("random", ()))
    is_converted = check_base(
        view, description["base"], shapes, random, anew=anew, renaming=renaming, refuse=refuse_base
    )
    check_tensors(view, entries, state, converting=is_converted)
    _check_finite(view, state)
    _check_lost(view, changed)
    view.adapter.look_untrained(random)


def check_foreign_fits(view: View, state: Mapping[str, Any], config: LoRAConfig) -> None:
    """Refuse adapters of another library that do not fit.

    Their base is not known, so it is not checked.

    Args:
        view: The adapted model.
        state: The tensors, by the names of the model.
        config: The configuration that adapts the model in the same way.

    Raises:
        AdapterFileError: values are NaN or infinite.
        AdapterMismatchError: a tensor does not fit, or rank, scaling or start differ.
        BaseMismatchError: the base's frozen weights have changed in training.
    """
    entries = entries_of(view, view.adapter.random or ())
    _check_settings(view, config)
    _check_start(view, config)
    check_names(view, entries, state, config=config)
    check_tensors(view, entries, state)
    _check_finite(view, state)
    _check_lost(view, ())


def _check_lost(view: View, changed: Collection[str]) -> None:
    lost = sorted(view.record.changed.keys() - set(changed))
    if lost:
        raise BaseMismatchError(
            f"Frozen weights of {type(view.model).__name__} have changed in training since these adapters were stored, "
            f"and their earlier values are in no file: {listed(lost)}. Build the model anew, then load."
        )


def _check_settings(view: View, config: LoRAConfig) -> None:
    """Refuse adapters that were trained with another rank or scaling: they would give another update."""
    for name, layer in view.layers.items():
        settings = layer.lora_settings
        for part in layer.lora_matrices:
            parameter = join(name, part.weight) if isinstance(layer, LoRAParameters) else ""
            r, scaling = min(config.rank(name, parameter), part.largest_rank), config.scaling(name, parameter)
            here, scaled = part.rank(settings.r), part.scaling or settings.scaling
            if r != here or not math.isclose(scaling, scaled):
                raise AdapterMismatchError(
                    f"These adapters were trained with r={r} and a scaling of {scaling:g} in {parameter or name!r}; "
                    f"here it has r={here} and a scaling of {scaled:g}. Adapt the model as they were trained: "
                    f"r={config.r}, alpha={config.alpha}, use_rslora={config.use_rslora}, "
                    f"rank_pattern={config.rank_pattern}, alpha_pattern={config.alpha_pattern}."
                )


def _check_start(view: View, config: LoRAConfig) -> None:
    """Refuse adapters with another start, which is a part of the update."""
    for name, layer in view.layers.items():
        found, expected = (init if init in FROM_BASE else "kaiming" for init in (layer.lora_settings.init, config.init))
        if found != expected:
            raise AdapterMismatchError(
                f"These adapters were trained with init={config.init!r}; here {name!r} has "
                f"init={layer.lora_settings.init!r}. Call remove_adapters(model) first: loading adapts it as they were "
                "trained."
            )


def _check_finite(view: View, state: Mapping[str, Any]) -> None:
    """Refuse NaN and infinite values, which a diverged run leaves."""
    statistics = set[str]()
    for name, module in view.modules.items():
        if isinstance(module, _NormBase):
            statistics |= {join(name, "running_mean"), join(name, "running_var")}
    checked = [*view.adapters, *view.trained, *(name for name in state if name in statistics)]
    originals = view.adapter.originals
    broken = [name for name in checked if not _is_sound(state[name], originals.get(name))]
    if broken:
        raise AdapterFileError(
            f"{listed(broken)} hold NaN or infinite values: the training that wrote them had diverged. Use an earlier "
            "checkpoint, or train again with a lower learning rate."
        )


def _is_sound(value: Tensor, original: Tensor | None) -> bool:
    """Whether ``value`` is finite, except where the base has the same infinite value, as a mask may."""
    odd = ~value.isfinite()
    return not odd.any() or (original is not None and bool((value[odd].cpu() == original[odd.cpu()]).all()))

"""Whether stored adapters fit a model: all of it is checked before anything is written."""

from collections.abc import Collection

import torch
from torch import Tensor

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    listed,
    misfits,
)
from lightning_lora.layers import INITIALISATIONS, LoRALayer, Settings
from lightning_lora.layers.matrices import AdaptedMatrix
from lightning_lora.model.base_values import tensors_with_originals
from lightning_lora.model.untrained.of_no_base import names_of_no_base
from lightning_lora.model.view import View
from lightning_lora.storage.same_base.base_check import check_base
from lightning_lora.storage.state import besides_frozen, diverged, trained_tensors
from lightning_lora.storage.stored import DIVERGED, StoredAdapters
from lightning_lora.storage.stored_layers import Wanted, bare, wanted_of
from lightning_lora.tensors.dicts import only, without
from lightning_lora.tensors.names import names_not_in
from lightning_lora.tensors.plain_states import StateDict, state_dict


def check_fits(
    view: View,
    stored: StoredAdapters,
    *,
    reads_base_anew: bool,
    refuses_other_base: bool,
) -> None:
    """Refuse stored adapters that do not fit an adapted model."""
    _check_settings(view, stored.config)
    _check_names_of_file(view, stored)
    is_converted = False
    if stored.names_its_base:
        is_converted = check_base(
            view,
            stored,
            reads_base_anew=reads_base_anew,
            refuses_other_base=refuses_other_base,
        )
    _check_tensors(
        view, without(stored.state, stored.filled_in_state), is_converted=is_converted
    )
    _check_finite(view, stored.state)
    _check_same_rows(view, stored)
    _check_changed(view, stored.state)


def check_state_fits(view: View, state: StateDict) -> None:
    """Refuse a state without a description that does not fit an adapted model."""
    remedy = "Use the same targets, modules_to_save and bias as for the training."
    _check_names(
        view,
        state,
        trained_tensors(view),
        of_no_base=names_of_no_base(view),
        remedy=remedy,
    )
    _check_tensors(view, state)
    _check_finite(view, state)


# Settings and layers


def _check_settings(view: View, config: LoRAConfig) -> None:
    """Refuse adapters that were trained with another rank, scaling or start: they would give another update."""
    for name, layer in view.layers.items():
        settings = layer.lora_settings
        is_same_start = _is_same_start(settings, config)
        for matrix in layer.lora_matrices:
            wanted = wanted_of(config, name, matrix, layer.lora_kind.__name__)
            is_met = wanted.is_met(matrix, settings.r, settings.scaling)
            if not (is_same_start and is_met):
                raise AdapterMismatchError(
                    _other_settings(view, config, wanted, matrix, layer)
                )


def _is_same_start(settings: Settings, config: LoRAConfig) -> bool:
    """Whether an update means here what it meant in the file's training.

    Most updates are added to the whole weight, and it no longer matters how they began.
    With PiSSA and the like (``is_difference``), an update counts from where it began:
    then both must have begun in the same way.
    """
    if settings.init == config.init:
        return True
    return not settings.is_difference and not INITIALISATIONS[config.init].is_difference


def _other_settings(
    view: View,
    config: LoRAConfig,
    wanted: Wanted,
    matrix: AdaptedMatrix,
    layer: LoRALayer,
) -> str:
    """What a file's adapters were trained with, and what the layer has."""
    settings = layer.lora_settings
    r = matrix.rank_for(settings.r)
    scaling = matrix.scaling_for(settings.scaling)
    start_there = start_here = ""
    if not _is_same_start(settings, config):
        start_there = f", init={config.init!r}"
        start_here = f", init={settings.init!r}"
    return (
        f"These adapters were trained with r={wanted.r} and a scaling of "
        f"{wanted.scaling:g}{start_there} in {wanted.target!r}; here it has r={r} and "
        f"a scaling of {scaling:g}{start_here}. {_as_trained(view, config)} Or give "
        "the Trainer LoRACallback() alone, or call remove_adapters(model) before "
        "load_adapter."
    )


def _as_trained(view: View, config: LoRAConfig) -> str:
    """What to do: take the arguments of the training that differ here, or if none do, the module of it."""
    here = view.config.to_dict()
    different = list[str]()
    for name, value in config.to_dict().items():
        if value != here[name]:
            different.append(f"{name}={value!r}, not {here[name]!r}")
    if not different:
        return "Build the module as it was built for training."
    return f"Use the arguments of the training: {'; '.join(different)}."


def _check_same_rows(view: View, stored: StoredAdapters) -> None:
    """Refuse a file that adapts other rows of a layer's weight than the model does.

    Ranks and scalings are not compared here (:func:`.bare`): ``_check_settings`` does
    that.
    """
    for name, layer in only(view.layers, stored.layers).items():
        matrices_there = set(map(bare, stored.layers[name].matrices))
        if matrices_there != set(map(bare, layer.lora_matrices)):
            raise AdapterMismatchError(
                f"In {name!r}, the file adapts other rows of the weight than this "
                f"model does. {_as_trained(view, stored.config)}"
            )


# Names


def _check_names_of_file(view: View, stored: StoredAdapters) -> None:
    """Refuse a file with missing or unexpected names.

    The changed weights that its description names must be in its state too.
    """
    needed = {
        **trained_tensors(view),
        **only(view.base_parameters, stored.frozen_in_state),
    }
    if stored.names_its_base:
        # what belongs to no base is expected already: weights that look untrained are
        # in ``frozen_in_state``, so they are needed, and all buffers are expected
        of_no_base: Collection[str] = ()
    else:
        # a file of another library does not say which weights look untrained
        of_no_base = view.adapter.known_of_no_base
    _check_names(
        view,
        stored.state,
        needed,
        of_no_base=of_no_base,
        remedy=_as_trained(view, stored.config),
    )


def _check_names(
    view: View,
    state: StateDict,
    needed: Collection[str],
    *,
    of_no_base: Collection[str],
    remedy: str,
) -> None:
    """Refuse a state that lacks what is needed, or has names that no file of this model has.

    Args:
        view: The model.
        state: The state.
        needed: The names that it must have.
        of_no_base: Names of tensors of this model that it may have, because each run
            has its own values of them.
        remedy: The end of the error.
    """
    missing = names_not_in(needed, state)
    frozen = {*of_no_base, *view.record.base.changes}
    expected = {
        *needed,
        *only(view.frozen_base, frozen),
        *view.buffers,
        *tensors_with_originals(view),
    }
    unexpected = names_not_in(state, expected)
    # modules' own code may have added the rest. The model's whole state tells, which is
    # made only if it must be
    if unexpected:
        in_whole_state = besides_frozen(view, state_dict(view.model))
        unexpected = names_not_in(unexpected, in_whole_state)
    wrong = misfits({"missing": missing, "unexpected": unexpected})
    if wrong:
        raise AdapterMismatchError(
            f"These adapters do not fit {view.title}: {wrong}. {remedy}"
        )


# The base


def _check_changed(view: View, state: StateDict) -> None:
    """Refuse a state without the values of weights that other code has changed in this model.

    Their earlier values are lost, so the model could not be what the file needs.
    """
    lost = sorted(set(view.record.base.changes) - state.keys())
    if lost:
        raise BaseMismatchError(
            f"Frozen weights of {view.title} have changed in training since these "
            "adapters were stored, and their earlier values are in no file: "
            f"{listed(lost)}. Build the model anew, then load."
        )


# Tensors


def _check_tensors(view: View, state: StateDict, *, is_converted: bool = False) -> None:
    """Refuse tensors of another shape or kind.

    If the base is converted here (``is_converted``), a value may be rounded, but not an
    adapter's. Filled buffers are not in this ``state``: they may have another shape.
    """
    present = {**view.base_parameters, **view.buffers, **trained_tensors(view)}
    # the state may have other entries: code of their modules decides whether these fit
    for name, value in only(state, present).items():
        is_adapter = name in view.adapter_parameters
        _check_shape(name, value, present[name], is_adapter=is_adapter)
        dtype = present[name].dtype
        is_rounded_base = (
            is_converted and not is_adapter and _fits_when_rounded(value, dtype)
        )
        if not is_rounded_base:
            _check_dtype(name, value.dtype, dtype)


def _check_shape(
    name: str, value: object, present: Tensor, *, is_adapter: bool
) -> None:
    """Refuse what is no tensor, or one of another shape."""
    if not isinstance(value, Tensor):
        raise AdapterMismatchError(
            f"{name!r} is a {type(value).__name__}. Expected a tensor."
        )
    if value.shape != present.shape:
        and_r = " and r" if is_adapter else ""
        raise AdapterMismatchError(
            f"{name!r} is {tuple(value.shape)}, but this model has "
            f"{tuple(present.shape)}. Build the model as it was built for training, "
            f"with the same sizes{and_r}."
        )


def _fits_when_rounded(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether a value, rounded to a dtype as by ``model.to``, does not overflow."""
    if not value.is_floating_point() or not dtype.is_floating_point:
        return False
    return torch.equal(value.isfinite(), value.to(dtype).isfinite())


def _check_dtype(name: str, there: torch.dtype, here: torch.dtype) -> None:
    """Refuse a dtype whose values the model's cannot hold."""
    is_same_kind = there.is_floating_point == here.is_floating_point
    if not is_same_kind or torch.promote_types(there, here) != here:
        raise AdapterMismatchError(
            f"{name!r} is {there}, but this model has {here}, which cannot hold the "
            f"same values. Convert the model first: model.to({there})."
        )


def _check_finite(view: View, state: StateDict) -> None:
    """Refuse what a diverged training has left."""
    broken = diverged(view, state)
    if broken:
        raise AdapterFileError(
            f"{listed(broken)} hold NaN or infinite values: {DIVERGED}."
        )

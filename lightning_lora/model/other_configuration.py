"""Refuse a configuration that asks for other adapters than those that a model has."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from lightning_lora.errors import AdapterMismatchError, listed
from lightning_lora.layers import AdaptedMatrix, Settings
from lightning_lora.model.changed_since_adapted import refuse_resized
from lightning_lora.model.records import records_in
from lightning_lora.model.view import View
from lightning_lora.targets.choice import Choice
from lightning_lora.tensors.dicts import renamed
from lightning_lora.tensors.names import is_in, names_joined, submodule

_BEGIN_ANEW = "To begin anew, build the model again."


def refuse_other_configuration(view: View, choices: Mapping[str, Choice]) -> None:
    """Refuse a configuration that asks for other adapters than those at hand, or for other layers.

    ``choices`` are the layers that the configuration selects.
    """
    for name in view.layers:
        if name not in choices:
            raise AdapterMismatchError(
                f"Layer {name!r} of {view.title} is adapted already, but this "
                f"configuration does not target it. {_BEGIN_ANEW} To keep these "
                "adapters, target it too, or give the new ones another name=..."
            )
        refuse_resized(view, name)
        _check_same_layer(view, name, choices[name])
    for prefix, record in records_in(view.modules).items():
        has_adapters_on = bool(record.adapter.layers) and not record.state.is_merged
        if has_adapters_on and record.adapter.config != view.config:
            _check_same_trained(view, prefix)


def _check_same_layer(view: View, name: str, choice: Choice) -> None:
    """Refuse other settings or matrices for an adapted layer."""
    layer = view.layers[name]
    here = _about(layer.lora_settings, layer.lora_matrices)
    wanted = _about(choice.settings, choice.matrices)
    keys = {**here, **wanted}  # "init" may be in only one of the two dicts
    different = [key for key in keys if here.get(key) != wanted.get(key)]
    if different:
        raise AdapterMismatchError(
            f"Layer {name!r} of {view.title} is adapted already, with "
            f"{_named(here, different)}, not {_named(wanted, different)}. "
            f"{_BEGIN_ANEW} To keep these adapters, use the same arguments, or give "
            "the new ones another name=..."
        )


def _named(values: Mapping[str, Any], keys: Collection[str]) -> str:
    """The values of these keys, as a message says them: ``r=4, alpha / r=2``."""
    return ", ".join(f"{key}={values.get(key)}" for key in keys)


def _check_same_trained(view: View, prefix: str) -> None:
    """Refuse if the module ``prefix`` trains other biases or whole modules than this configuration."""
    trained_there = set(
        names_joined(prefix, View(submodule(view.model, prefix)).trainable_base)
    )
    trained_here = {name for name in view.trainable_base if is_in(name, prefix)}
    if trained_there != trained_here:
        raise AdapterMismatchError(
            f"{view.title} is adapted already, and trains "
            f"{_listed_or_nothing(trained_there)} beside its adapters, not "
            f"{_listed_or_nothing(trained_here)}. {_BEGIN_ANEW} To keep these "
            "adapters, use the same modules_to_save and bias, or give the new ones "
            "another name=..."
        )


def _listed_or_nothing(names: Collection[str]) -> str:
    return listed(names) if names else "nothing"


_USERS_WORDS = {"scaling": "alpha / r", "autocast_dtype": "autocast_adapter_dtype"}


def _about(settings: Settings, matrices: Iterable[AdaptedMatrix]) -> dict[str, Any]:
    """An adapter's settings and matrices, in users' words."""
    compared = asdict(settings)
    del compared["trains"]  # a paused adapter is the same one
    # how an adapter began does not matter later, unless its update is the difference
    # from this beginning
    if not settings.is_difference:
        del compared["init"]
    about = renamed(compared, _in_users_words)
    about["matrices"] = [_about_matrix(matrix) for matrix in matrices]
    return about


def _in_users_words(name: str) -> str:
    return _USERS_WORDS.get(name, name)


def _about_matrix(matrix: AdaptedMatrix) -> tuple[Any, ...]:
    """What a matrix is, and which settings of its own it has, in place of its layer's."""
    about = (matrix.name or matrix.weight, matrix.first, matrix.reads, matrix.writes)
    its_own = [value for value in (matrix.r, matrix.scaling, matrix.tokens) if value]
    return (*about, *its_own)

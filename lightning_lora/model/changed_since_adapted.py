"""Whether a model is as it was adapted: its layers, and the configuration that is asked for now."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_lora.errors import AdapterMismatchError, AdapterStateError, listed
from lightning_lora.layers import (
    AdaptedMatrix,
    LoRALayer,
    LoRATokens,
    Settings,
    tied_to,
)
from lightning_lora.model.records import records_in
from lightning_lora.model.view import View
from lightning_lora.targets.choice import Choice
from lightning_lora.tensors.dicts import of_type, renamed, where
from lightning_lora.tensors.inplace import is_overlaid
from lightning_lora.tensors.names import find_parameter, is_in, names_joined, submodule


def refuse_computed_weights(view: View) -> None:
    """Refuse adapted weights that are computed now: prune, parametrize, weight_norm and the like replace them."""
    computed = where(view.layers, _was_replaced)
    if computed:
        raise AdapterStateError(
            f"Since it was adapted, the weight of {listed(computed)} of {view.title} "
            "is computed, so no update can be stored, merged or removed. Undo that "
            "(prune.remove, remove_parametrizations), and do it before the adapters "
            "come: before inject_adapters, or in the module's __init__. Or leave the "
            "layer out: exclude_modules."
        )


def _was_replaced(layer: LoRALayer) -> bool:
    """Whether other code has replaced the class or the weights of an adapted layer."""
    present = dict(layer.named_parameters(remove_duplicate=False))
    has_its_weights = present.keys() >= set(layer.lora_weights())
    return not (is_overlaid(layer) and has_its_weights)


def refuse_resized_or_tied(view: View) -> None:
    """Refuse layers that were resized since they were adapted, and those tied or untied since.

    A tie matters only if it is to an embedding whose rows train (``LoRATokens``): the
    tied layer computes with these rows.
    """
    for name in where(view.layers, LoRALayer.lora_is_resized):
        raise _changed_since(view, name, "resized")
    embeddings_by_weight = dict[object, nn.Module]()
    for embedding in of_type(view.layers, LoRATokens).values():
        embeddings_by_weight[embedding.weight] = embedding
    for name, module in view.modules.items():
        # a module that is not tied, as most are, counts as tied to itself
        tied_then = tied_to(module)
        weight_now = find_parameter(module, "weight")
        tied_now = embeddings_by_weight.get(weight_now, module)
        if tied_now is not tied_then:
            raise _changed_since(
                view, name, "tied to an embedding whose rows train, or untied,"
            )


def _changed_since(view: View, layer: str, what: str) -> AdapterStateError:
    """The error for a layer that was changed since it was adapted."""
    return AdapterStateError(
        f"{layer!r} of {view.title} was {what} after inject_adapters. Call "
        "inject_adapters(model, config) again, which follows that; before it for a "
        "resized layer that has trained, remove_adapters."
    )


def refuse_other_configuration(view: View, choices: Mapping[str, Choice]) -> None:
    """Refuse a configuration that asks for other adapters than those at hand, or for other layers.

    ``choices`` are the layers that the configuration selects.
    """
    for name, layer in view.layers.items():
        if name not in choices:
            raise AdapterMismatchError(
                f"Layer {name!r} of {view.title} is adapted already, but this "
                f"configuration does not target it. {_BEGIN_ANEW} To keep these "
                "adapters, target it too, or give the new ones another name=..."
            )
        if layer.lora_is_resized():
            raise _changed_since(view, name, "resized")
        _check_same_layer(view, name, choices[name])
    for prefix, record in records_in(view.modules).items():
        if record.state.is_merged or not record.adapter.layers:
            continue
        is_other_configuration = record.adapter.config != view.config
        if is_other_configuration:
            _check_same_trained(view, prefix)


_BEGIN_ANEW = "To begin anew, build the model again."


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

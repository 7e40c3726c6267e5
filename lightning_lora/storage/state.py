"""What training changed of a model: taken out of it, and written back once everything is checked."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterMismatchError, listed
from lightning_lora.model.attach import check_as_folded, fold, unfold
from lightning_lora.model.merge import merge_adapters, unmerge_adapters
from lightning_lora.model.record import (
    adapted_layers,
    adapter_parameters,
    base_entries,
    base_parameters,
    keep_frozen,
    kept_tensors,
    persistent_buffers,
    record_of,
    restore_originals,
    same_bits,
    trained_base_parameters,
)
from lightning_lora.tensors.names import load_state_dict, named_parameters, plain_name, state_dict
from lightning_lora.tensors.values import digest


def adapter_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return all that training changed, and nothing else.

    That is: the adapters, biases and modules that are trained beside them, buffers and frozen weights that no longer
    have the base's values, and whatever a module adds to its state dict by itself.

    Args:
        model: A model with adapters: adapted, merged, or made plain again by a finished fit.

    Returns:
        Tensors by the names they have in ``model.state_dict()``.

    Raises:
        AdapterStateError: ``model`` has no adapters.

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> list(adapter_state_dict(model))
        ['0.lora_A', '0.lora_B']
    """
    check_as_folded(model)
    return without_base(model, state_dict(model))


def without_base(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from a state of ``model`` what the base has already: frozen weights, and buffers with the same values.

    What other code than an optimizer changed of the frozen weights is kept, or put in; so is what trains and ``state``
    does not hold: user code may drop all that it takes for the base.
    """
    record, base = record_of(model), base_parameters(model)
    adapters, trained = adapter_parameters(model), trained_base_parameters(model, record.config)
    ids = {id(p) for p in adapters.values()}
    shown = named_parameters(model, remove_duplicate=False)
    aliases = {name for name, p in shown.items() if id(p) in ids} - set(adapters)
    dropped = aliases | (set(base) - set(trained)) | set(base_entries(model))
    originals = {name: value for name, value in record.originals.items() if name not in trained}
    changed = {name: base[name].detach() for name in (*record.changed, *originals) if name in base}
    held = {**changed, **{plain_name(name): value for name, value in state.items() if plain_name(name) not in dropped}}
    kept = {name: value for name, value in held.items() if name not in originals or not _same(value, originals[name])}
    merged = {name for name in trained if name in kept and shown[name] is not trained[name]}  # its other, tied use
    needed = {name: p.detach() for name, p in _required(model).items()}
    return {**needed, **kept, **{name: trained[name].detach() for name in merged}}


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write back what :func:`adapter_state_dict` returned: everything is checked, then everything is written.

    What else may change, and ``state`` does not hold, gets the base's values: buffers, for example. A merged model is
    merged again with the new adapters.

    Args:
        model: A model adapted as the one that ``state`` is of.
        state: Tensors by name.

    Raises:
        AdapterMismatchError: a name is missing, unexpected, or of another shape or kind. Nothing was written then.
        AdapterStateError: ``model`` has no adapters.
    """
    record_of(model)
    check_names(model, state)
    check_tensors(model, state)
    write_state(model, state)


def write_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a state that has been checked."""
    record, base = record_of(model), base_parameters(model)
    trained = trained_base_parameters(model, record.config)
    keep_frozen(model, [name for name in state if name in base and name not in trained])
    with adapters_live(model):
        before = {name: value for name, value in state_dict(model).items() if name in state or name in record.originals}
        before = {name: value.clone() for name, value in before.items() if isinstance(value, Tensor)}
        try:
            restore_originals(model, [name for name in record.originals if name not in state and name not in trained])
            load_state_dict(model, state)
        except BaseException:  # a module's own loading may fail
            load_state_dict(model, before)
            raise
    for name, (_, was) in record.changed.items():
        record.changed[name] = (digest(base_parameters(model)[name]), was)


@contextmanager
def adapters_live(model: nn.Module) -> Iterator[None]:
    """Un-merge for a while."""
    folded = unfold(model)
    merged = any(layer.lora_bases for layer in adapted_layers(model).values())
    unmerge_adapters(model)
    try:
        yield
    finally:
        if folded:
            fold(model)
        elif merged:
            merge_adapters(model)


def _required(model: nn.Module) -> dict[str, Tensor]:
    """What a stored state of ``model`` must hold."""
    return {**adapter_parameters(model), **trained_base_parameters(model, record_of(model).config)}


def _optional(model: nn.Module) -> dict[str, Any]:
    """What it may hold besides: buffers, frozen weights that changed, and what a module adds to its state by itself."""
    return {**without_base(model, state_dict(model)), **persistent_buffers(model), **kept_tensors(model)}


def check_names(
    model: nn.Module, state: Mapping[str, Any], changed: Collection[str] = (), config: LoRAConfig | None = None
) -> None:
    """Refuse a state that lacks a name that ``model`` needs, or has one that it does not know.

    Args:
        model: The adapted model.
        state: What is to be written into it.
        changed: Names of frozen weights that ``state`` is known to have new values for.
        config: What ``state`` was trained with, if that is known.

    Raises:
        AdapterMismatchError: it does.
    """
    base = base_parameters(model)
    required = {**_required(model), **{name: base[name] for name in changed if name in base}}
    optional = _optional(model)
    missing = [name for name in required if name not in state]
    unexpected = [name for name in state if name not in required and name not in optional]
    if missing or unexpected:
        wrong = {"missing": missing, "unexpected": unexpected}
        found = " and ".join(f"{what} {listed(names)}" for what, names in wrong.items() if names)
        trained = f"with {_selecting(config)}" if config else "with the same targets, modules_to_save and bias"
        raise AdapterMismatchError(
            f"These adapters do not fit {type(model).__name__}: {found}. Adapt the model as they were trained: "
            f"{trained}."
        )


def _selecting(config: LoRAConfig) -> str:
    """The arguments that say what of a model trains, but those that are at their defaults."""
    default = LoRAConfig()
    names = ("target_slices", "target_parameters", "exclude_modules", "modules_to_save", "bias", "init", "use_dora")
    said = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    said = {"target_modules": config.target_modules, **said}
    return ", ".join(f"{name}={list(v) if isinstance(v, tuple) else v!r}" for name, v in said.items())


def check_tensors(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse a state, of the right names, with a tensor of another shape or kind than that of ``model``.

    Raises:
        AdapterMismatchError: it has one.
    """
    known = {**base_parameters(model), **_optional(model), **_required(model)}
    for name, value in state.items():
        if isinstance(known[name], Tensor):
            _check_tensor(name, value, known[name])


def _check_tensor(name: str, value: object, expected: Tensor) -> None:
    if not isinstance(value, Tensor) or value.shape != expected.shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise AdapterMismatchError(
            f"{name!r} is {found}, but this model has {tuple(expected.shape)}. Build the model as it was built for "
            "training, and adapt it with the same r."
        )
    if value.layout != expected.layout or (value.is_meta and not expected.is_meta):
        raise AdapterMismatchError(
            f"{name!r} has no values that could be written (it is {value.layout}, {value.device})."
        )
    if torch.promote_types(value.dtype, expected.dtype) != expected.dtype or (
        value.is_floating_point() != expected.is_floating_point()
    ):
        raise AdapterMismatchError(
            f"{name!r} is {value.dtype}, but this model has {expected.dtype}, which cannot hold the same values. "
            f"Convert the model first: model.to({value.dtype})."
        )


def _same(value: Any, original: Tensor) -> bool:
    return isinstance(value, Tensor) and same_bits(value.detach(), original)

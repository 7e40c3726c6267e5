"""What a Trainer's checkpoint says of its adapters, and how it is checked before it is used."""

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, ConfigError, listed
from lightning_lora.model.record import (
    adapted_layers,
    adapter_parameters,
    base_parameters,
    base_values,
    follow_base,
    record_of,
    trained_base_parameters,
)
from lightning_lora.storage.base_copies import MOVED, is_places, leave_out_base, put_base_back
from lightning_lora.storage.fingerprint import check_base, fingerprint, is_fingerprints, note_changed
from lightning_lora.storage.state import adapters_live, check_names, check_tensors, without_base, write_state
from lightning_lora.tensors.names import load_state_dict, named_modules, plain_name, state_dict
from lightning_lora.tensors.values import digest

KEY = "lightning_lora"
"""Where a Lightning checkpoint, or a safetensors file's metadata, says what its adapters are."""

FORMAT = 2
"""The version of what is stored there."""


# The description


def describe(model: nn.Module, state: Mapping[str, Any], base: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Return, in plain types, what must be known to use ``state`` rightly.

    Args:
        model: The adapted model.
        state: What of it is stored.
        base: The forms in which its base was seen.
        **more: What else is to be said, in plain types.

    Returns:
        The format, the configuration, the base, the names of frozen weights that changed, how many entries ``state``
        has, and a checksum of it all.
    """
    config = record_of(model).config
    frozen = base_parameters(model).keys() - trained_base_parameters(model, config).keys()
    changed = [name for name in state if name in frozen]
    about = {
        "format": FORMAT,
        "config": config.to_dict(),
        "base": base,
        "changed": changed,
        "entries": len(state),
        **more,
    }
    if not _is_bounded(about):
        raise ConfigError(
            "The configuration is too long to be stored. Name many layers by one expression, such as "
            "target_modules=r'.*\\.q_proj'."
        )
    return {**about, "checksum": _checksum(state, about)}


def forms_of_base(model: nn.Module) -> list[dict[str, Any]]:
    """Return the forms in which the base of ``model`` was seen in a run, if it is still that base, or its form now."""
    known, now = record_of(model).fingerprints, fingerprint(model)
    return known if now in known else [now]


def check_fits(model: nn.Module, state: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """Refuse stored adapters that do not fit an adapted model, whether in shape or in meaning.

    Raises:
        AdapterFileError: the description cannot be read.
        AdapterMismatchError: a tensor does not fit, or the same factors would give another update here.
        BaseMismatchError: they were trained on another base.
    """
    config = stored_config(description)
    for name, layer in adapted_layers(model).items():
        theirs = (config.rank(name), config.scaling(name))
        ours = (layer.lora_settings.r, layer.lora_settings.scaling)
        if theirs != ours:
            raise AdapterMismatchError(
                f"These adapters were trained with r={theirs[0]} and a scaling of {theirs[1]:g} in {name!r}; here it "
                f"has r={ours[0]} and a scaling of {ours[1]:g}. Adapt the model as they were trained: r={config.r}, "
                f"alpha={config.alpha}, use_rslora={config.use_rslora}, rank_pattern={config.rank_pattern}, "
                f"alpha_pattern={config.alpha_pattern}."
            )
    changed = description.get("changed", ())
    check_names(model, state, changed, config)
    check_base(model, description["base"], {name: v.shape for name, v in state.items() if isinstance(v, Tensor)})
    check_tensors(model, state)
    _check_finite(model, state)
    lost = sorted(record_of(model).changed.keys() - set(changed))
    if lost:
        raise BaseMismatchError(
            f"Frozen weights of {type(model).__name__} have changed in training since these adapters were stored, and "
            f"their values of then are in no file: {listed(lost)}. Build the model anew, then load."
        )


def stored_config(description: object) -> LoRAConfig:
    """Return the configuration of stored adapters.

    Raises:
        AdapterFileError: ``description`` is not one that :func:`describe` made.
    """
    foreign = AdapterFileError(f"The file's {KEY!r} entry is not one that this package wrote: damaged, or foreign.")
    if not isinstance(description, dict) or type(description.get("format")) is not int or not _is_bounded(description):
        raise foreign
    if description["format"] != FORMAT:
        raise AdapterFileError(
            f"The file has format {description['format']}; expected {FORMAT}. Use the version that wrote it."
        )
    if not _is_plain(description):
        raise foreign
    try:
        return LoRAConfig.from_dict(description["config"])
    except ConfigError as error:
        raise AdapterFileError(f"The file's configuration cannot be used: {error}") from error


def _is_bounded(value: object, most: int = 1 << 24) -> bool:
    """Whether ``value``, written out, has about as many characters at most: repeating costs a pickle nothing."""
    left, inside = most, [value]
    while inside and left > 0:
        each = inside.pop()
        left -= 16 * len(each) if isinstance(each, list | dict) else len(each) if isinstance(each, str) else 16
        if left > 0 and isinstance(each, list | dict):
            inside += [*each, *each.values()] if isinstance(each, dict) else each
    return left > 0


def _is_plain(description: dict[Any, Any]) -> bool:
    """Whether each part is of its type, so that nothing that is done with it takes more than a look at the file."""
    known = ("format", "config", "base", "changed", "entries", "checksum")
    _, config, base, changed, entries, checksum = (description.get(key) for key in known)
    copies = description.get("copies", [])
    return (
        description.keys() <= {*known, "copies"}
        and isinstance(config, dict)
        and is_fingerprints(base)
        and _is_names(changed)
        and type(entries) is type(checksum) is int
        and is_places(copies)
    )


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _check_finite(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Refuse what a run that had diverged left."""
    trains = {**adapter_parameters(model), **trained_base_parameters(model, record_of(model).config)}
    norms = [name for name, module in named_modules(model).items() if isinstance(module, _NormBase)]
    statistics = {f"{name}.{kind}".removeprefix(".") for name in norms for kind in ("running_mean", "running_var")}
    held = [*trains, *(name for name in state if name in statistics)]
    originals = record_of(model).originals
    broken = [name for name in held if not _is_sound(state[name], originals.get(name))]
    if broken:
        raise AdapterFileError(
            f"{listed(broken)} hold NaN or infinite values: the training that wrote them had diverged. Use an earlier "
            "checkpoint, or train again with a lower learning rate."
        )


def _is_sound(value: Tensor, original: Tensor | None) -> bool:
    """Whether ``value`` is finite, but where the base was not either: a mask may be infinite."""
    odd = ~value.isfinite()
    return not odd.any() or (original is not None and bool((value[odd].cpu() == original[odd.cpu()]).all()))


def _checksum(state: Mapping[str, Any], about: Mapping[str, Any]) -> int:
    """One number for the names and contents of all tensors, and for what is said about them."""
    said = {name: value for name, value in about.items() if name != "checksum"}
    names = sorted(name for name, value in state.items() if isinstance(value, Tensor) and not value.is_meta)
    kinds = [[name, str(state[name].dtype), list(state[name].shape)] for name in names]
    text = json.dumps([said, kinds], sort_keys=True).encode()
    total = digest(torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for name in names:
        total = (total * 1_000_003 + digest(state[name])) % (1 << 63)
    return total


def check_entries(names: Collection[str], description: Mapping[str, Any], path: object) -> None:
    """Refuse more or fewer entries than were written, before anything is done with them.

    Raises:
        AdapterFileError: there are.
    """
    if len(names) != description["entries"]:
        raise AdapterFileError(
            f"{path} has {len(names)} entries, and {description['entries']} were written: it is damaged or was changed."
        )


def check_checksum(state: Mapping[str, Any], description: Mapping[str, Any], path: object) -> None:
    """Refuse what was changed after it was written.

    Raises:
        AdapterFileError: ``state`` or ``description`` was.
    """
    check_entries(state, description, path)
    odd = [name for name, value in state.items() if isinstance(name, str) and not _is_stored(value)]
    odd += [f"a name of type {type(name).__name__}" for name in state if not isinstance(name, str)]
    if odd:
        raise AdapterFileError(
            f"{path} holds what this package does not write: {listed(odd)}. The file is damaged or was changed."
        )
    if _checksum(state, description) != description["checksum"]:
        raise AdapterFileError(
            f"The adapters in {path} are not as they were written: the file is damaged or was changed."
        )


def _is_stored(value: object) -> bool:
    """Whether ``value``, if it is a tensor, is a plain one with no more elements than it has memory for."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return True
    plain = not value.is_quantized and not value.is_nested
    return plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


# Checkpoints


def adapter_only(model: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return ``checkpoint`` as it is to be written: what training changed of ``model``, and its description.

    A frozen weight that other code than an optimizer changed since the run began is stored from then on.
    """
    base = note_changed(model)
    rest, places = leave_out_base(model, checkpoint)
    states = {
        key: {name: _alone(value) for name, value in without_base(model, checkpoint[key]).items()}
        for key in ("state_dict", MOVED)
        if key in checkpoint
    }
    return {**rest, **states, KEY: describe(model, states["state_dict"], base, copies=places)}


def _alone(value: Any) -> Any:
    """``value`` with the memory for its own elements and no other's, which would go into the file with it."""
    if not isinstance(value, Tensor) or value.is_meta or value.layout is not torch.strided:
        return value
    exact = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if exact else value.clone(memory_format=torch.contiguous_format)


def check_readable(checkpoint: object, path: object) -> None:
    """Refuse what is no Lightning checkpoint, or one whose adapters are not as they were written.

    Raises:
        AdapterFileError: it is one of these.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise AdapterFileError(
            f"{path} is no Lightning checkpoint: it has no 'state_dict'. Pass one that a Trainer wrote."
        )
    if "pytorch-lightning_version" not in checkpoint:
        raise AdapterFileError(f"{path} is no Lightning checkpoint: it has no version. Pass one that a Trainer wrote.")
    if KEY in checkpoint:
        stored_config(checkpoint[KEY])
        check_checksum(checkpoint["state_dict"], checkpoint[KEY], path)


def as_base(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a full checkpoint as the start of a fine-tune: its weights, and nothing of the run that made it."""
    run = {"callbacks", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step", MOVED, "averaging_state"}
    kept = {key: value for key, value in checkpoint.items() if key not in run}
    return {**kept, "epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}


def complete_copies(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Put back what :func:`adapter_only` left out of a checkpoint that was read, but for the model's own states."""
    put_base_back(model, checkpoint, checkpoint[KEY].get("copies", ()))


def load_checkpoint_state(model: nn.Module, checkpoint: dict[str, Any], *, whole: bool = False) -> None:
    """Write a Trainer checkpoint into an adapted model: adapters, or the weights of a full one as its base.

    Args:
        model: The adapted model.
        checkpoint: The checkpoint.
        whole: Let it hold whole states of the model afterwards, base and all, for the callbacks that read it next.

    Raises:
        AdapterMismatchError, BaseMismatchError, AdapterFileError: it does not fit. Nothing was written then.
    """
    state = checkpoint["state_dict"]
    if KEY not in checkpoint:
        _load_base(model, state)
        return
    check_fits(model, state, checkpoint[KEY])
    if whole:
        base = {name: value.clone() for name, value in base_values(model).items()}
        for key in ("state_dict", MOVED):
            if key in checkpoint:
                checkpoint[key] = _completed(model, checkpoint[key], base)
    write_state(model, state)


def _completed(model: nn.Module, state: Mapping[str, Any], base: Mapping[str, Tensor]) -> dict[str, Any]:
    """A state with the base's values beside it, in the order and under the names of the model itself."""
    held = {**base, **{plain_name(name): value for name, value in state.items()}}
    own = {plain_name(name): name for name in model.state_dict(keep_vars=True)}
    order = {**{name: None for name in own if name in held}, **held}  # callbacks may go by the model's order
    return {own.get(name, name): held[name] for name in order}


def _load_base(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Write a full state into the base, and start the adapters anew."""
    adapters = {id(p) for p in adapter_parameters(model).values()}
    state = {plain_name(name): value for name, value in state.items()}
    expected = state_dict(model, keep_vars=True)
    expected = {name: value for name, value in expected.items() if id(value) not in adapters}
    wrong = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "of another shape": [
            name for name in expected if _shape(state.get(name)) not in (None, _shape(expected[name]))
        ],
    }
    if any(wrong.values()):
        found = ", ".join(f"{what} {listed(names)}" for what, names in wrong.items() if names)
        raise BaseMismatchError(
            f"This checkpoint has no adapters of this package, and as a base it does not fit {type(model).__name__}: "
            f"{found}. Pass a checkpoint of the same model, trained with or without LoRACallback."
        )
    with adapters_live(model):
        for layer in adapted_layers(model).values():
            layer.lora_restart()
        load_state_dict(model, state)
        follow_base(model)
    record_of(model).fingerprints = []


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None

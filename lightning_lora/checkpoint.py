"""What a Trainer's checkpoint says of its adapters, and how it is checked before it is used."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adapted import adapted_layers, adapter_parameters, record_of
from lightning_lora.config import LoRAConfig
from lightning_lora.errors import AdapterFileError, AdapterMismatchError, BaseMismatchError, ConfigError, listed
from lightning_lora.fingerprint import base_tensors, check_base, fingerprint
from lightning_lora.functional import digest
from lightning_lora.names import load_state_dict, plain_name, state_dict
from lightning_lora.state import (
    adapters_live,
    check_names,
    check_tensors,
    load_adapter_state_dict,
    without_base,
)

KEY = "lightning_lora"
"""Where a Lightning checkpoint, or a safetensors file's metadata, says what its adapters are."""

FORMAT = 1
"""The version of what is stored there."""


# The description


def describe(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return, in plain types, what must be known to use ``state`` rightly: format, configuration, base, checksum.

    Args:
        model: The adapted model.
        state: What of it is stored.
    """
    record, now = record_of(model), fingerprint(model)
    forms = record.fingerprints if now in record.fingerprints else [now]
    about = {"format": FORMAT, "config": record.config.to_dict(), "base": forms}
    return {**about, "checksum": _checksum(state, about)}


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
        ours = (layer.lora_A.shape[0], layer.lora_scaling)
        if theirs != ours:
            raise AdapterMismatchError(
                f"These adapters were trained with r={theirs[0]} and a scaling of {theirs[1]:g} in {name!r}; here it "
                f"has r={ours[0]} and a scaling of {ours[1]:g}. Adapt the model as they were trained: r={config.r}, "
                f"alpha={config.alpha}, use_rslora={config.use_rslora}, rank_pattern={config.rank_pattern}, "
                f"alpha_pattern={config.alpha_pattern}."
            )
    check_names(model, state)
    check_base(model, description["base"])
    check_tensors(model, state)


def stored_config(description: object) -> LoRAConfig:
    """Return the configuration of stored adapters.

    Raises:
        AdapterFileError: ``description`` is not one that :func:`describe` made.
    """
    if not isinstance(description, Mapping) or not {"format", "config", "base", "checksum"} <= set(description):
        raise AdapterFileError(f"The file's {KEY!r} entry is not one that this package wrote: damaged, or foreign.")
    if description["format"] != FORMAT:
        raise AdapterFileError(
            f"The file has format {description['format']!r}; expected {FORMAT}. Use the version that wrote it."
        )
    try:
        return LoRAConfig.from_dict(description["config"])
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise AdapterFileError(f"The file's configuration cannot be used: {error}") from error


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


def check_checksum(state: Mapping[str, Any], description: Mapping[str, Any], path: object) -> None:
    """Refuse what was changed after it was written.

    Raises:
        AdapterFileError: ``state`` or ``description`` was.
    """
    if _checksum(state, description) != description["checksum"]:
        raise AdapterFileError(
            f"The adapters in {path} are not as they were written: the file is damaged or was changed."
        )


# Checkpoints


def adapter_only(model: nn.Module, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return ``checkpoint`` as it is to be written: what training changed of ``model``, and its description."""
    state = without_base(model, checkpoint["state_dict"])
    description = describe(model, state)
    forms = record_of(model).fingerprints
    if forms and description["base"] != forms:
        names, now = list(base_tensors(model)), description["base"][0]["digests"]
        before = next((form["digests"] for form in forms if len(form["digests"]) == len(now)), now)
        changed = [name for name, a, b in zip(names, before, now, strict=False) if a != b]
        raise BaseMismatchError(
            f"Frozen weights of {type(model).__name__} are no longer those that its run began with: {listed(changed)}. "
            "A checkpoint of adapters would not hold them, and resuming from it would not be the same run. If your "
            "code is to change them, name their module in modules_to_save."
        )
    return {**checkpoint, "state_dict": state, KEY: description}


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
    run = {"callbacks", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"}
    kept = {key: value for key, value in checkpoint.items() if key not in run}
    return {**kept, "epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}


def load_checkpoint_state(model: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Write a Trainer checkpoint into an adapted model: adapters, or the weights of a full one as its base.

    Raises:
        AdapterMismatchError, BaseMismatchError, AdapterFileError: it does not fit. Nothing was written then.
    """
    state = checkpoint["state_dict"]
    if KEY in checkpoint:
        check_fits(model, state, checkpoint[KEY])
        load_adapter_state_dict(model, state)
    else:
        _load_base(model, state)


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
        load_state_dict(model, state)
        for layer in adapted_layers(model).values():
            layer.lora_start(layer.lora_A, layer.lora_B, layer.lora_init)
    record_of(model).fingerprints = []


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None

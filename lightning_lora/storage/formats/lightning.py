"""What a Lightning checkpoint holds besides the model's state: the run's, which users may edit, and their own."""

from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import Tensor

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.private import tree_leaves
from lightning_lora.storage.schema import check_named, fits
from lightning_lora.storage.stored import DIVERGED, KEY, check_checksum, stored_config

VERSION = "pytorch-lightning_version"  # which wrote the checkpoint
MOVED = "current_model_state"  # where WeightAveraging moves the module's own state: "state_dict" holds the average
AVERAGE = "average_model_state"  # where StochasticWeightAveraging has the average's state
_RESUMED = ("optimizer_states", "lr_schedulers", "loops")  # without which a fit cannot go on


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


_TYPES = {
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": {str: _is_mapping},
    "callbacks": _is_mapping,
    "hyper_parameters": _is_mapping,
    "epoch": int,
    "global_step": int,
}


def has_run(checkpoint: Mapping[Any, Any]) -> bool:
    """Whether a checkpoint holds the state of a run."""
    return checkpoint.keys() >= set(_RESUMED)


def check_resumable(checkpoint: Mapping[Any, Any], path: object) -> None:
    """Refuse a checkpoint from which a fit cannot go on."""
    if not has_run(checkpoint):
        missing = [name for name in _RESUMED if name not in checkpoint]
        raise AdapterFileError(
            f"{path} has no {listed(missing)}, so a fit cannot go on from it: it may have been written with "
            "save_weights_only=True. Load its adapters with load_adapter(model, path), and call fit without ckpt_path."
        )
    for state in checkpoint["optimizer_states"]:
        if not isinstance(state, Mapping) or not isinstance(state.get("param_groups"), list):
            raise AdapterFileError(f"{path} is damaged or was changed: it has no state of an optimizer where one was.")
        for value in tree_leaves(state.get("state")):
            is_number = isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
            if is_number and not value.isfinite().all():
                raise AdapterFileError(f"The optimizer's state in {path} holds NaN or infinite values: {DIVERGED}.")


def check_readable(checkpoint: object, path: object) -> None:
    """Refuse what is not a Lightning checkpoint, or not as it was written."""
    checkpoint = checkpoint if isinstance(checkpoint, Mapping) else {}
    if VERSION not in checkpoint or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise AdapterFileError(
            f"{path} is not a Lightning checkpoint, with 'state_dict' and {VERSION!r}. Pass one that a Trainer wrote. "
            "With a file of adapters, build the model and call load_adapter(model, path)."
        )
    check_named(checkpoint["state_dict"], path)
    damaged = f"{path} is damaged or was changed: "
    try:
        Version(checkpoint[VERSION])
    except (InvalidVersion, TypeError) as error:
        raise AdapterFileError(
            f"{damaged}{str(checkpoint[VERSION])[:50]!r} is no version of Lightning. Use another checkpoint."
        ) from error
    if KEY in checkpoint:
        stored_config(checkpoint[KEY])
        check_checksum(checkpoint["state_dict"], checkpoint[KEY], path)
        if wrong := [name for name in _TYPES if name in checkpoint and not fits(checkpoint[name], _TYPES[name])]:
            raise AdapterFileError(f"{damaged}Lightning did not write its {listed(wrong)}. Use another checkpoint.")


def as_base(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a full checkpoint as the base of a fine-tune: without the state of the run that wrote it."""
    run = {"callbacks", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step", MOVED, "averaging_state"}
    anew = {"epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}
    return {key: value for key, value in checkpoint.items() if key not in run} | anew

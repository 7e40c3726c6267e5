"""What a Lightning checkpoint holds besides the model's state: the state of the run, and that of callbacks.

A checkpoint is none of the formats of other libraries. Its entry ``VERSION_KEY`` tells
it from them.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeGuard

from lightning_lora.errors import AdapterFileError, listed
from lightning_lora.storage.checksum import check_as_written
from lightning_lora.storage.stored import KEY
from lightning_lora.tensors.dicts import dict_or_empty, without
from lightning_lora.tensors.names import last_component, names_not_in

# the entry with the version of Lightning that wrote the checkpoint
VERSION_KEY = "pytorch-lightning_version"
# the entry to which WeightAveraging moves the module's own state: its "state_dict" holds
# the average
MOVED = "current_model_state"
# the entry in which StochasticWeightAveraging has the state of its average
AVERAGE = "average_model_state"
_CALLBACKS = "callbacks"  # the entry with the states of callbacks
_OURS = "lightning_lora.LoRACallback"  # the name of our callback in that entry
# the entries without which a fit cannot go on
_RESUMED = ("optimizer_states", "lr_schedulers", "loops")
# the entries that a new run does not begin with
_OF_THE_RUN = (*_RESUMED, _CALLBACKS, "epoch", "global_step", MOVED, "averaging_state")


def check_resumable(checkpoint: Mapping[Any, Any], path: object) -> None:
    """Refuse a checkpoint from which a fit cannot go on."""
    missing = names_not_in(_RESUMED, checkpoint)
    if missing:
        raise AdapterFileError(
            f"{path} has no {listed(missing)}, so a fit cannot go on from it: it may "
            "have been written with save_weights_only=True. Load its adapters with "
            "load_adapter(model, path), and call fit without ckpt_path."
        )


def with_callback_state(checkpoint: Mapping[str, Any], adapter: str) -> dict[str, Any]:
    """Return a checkpoint with a state of LoRACallback.

    So a Trainer that loads it without the callback warns that the callback is missing.
    With ``strict_loading = False``, nothing else says so: torch then ignores the names
    of adapters.
    """
    return {
        **checkpoint,
        _CALLBACKS: {**checkpoint.get(_CALLBACKS, {}), _OURS: {"name": adapter}},
    }


def remove_callback_state(checkpoint: dict[str, Any]) -> None:
    """Take the state of LoRACallback out of a checkpoint, in place.

    The callback is here, and needs no state. Beside weights alone, Lightning writes no
    entry of callbacks, so an empty one is taken out, too.
    """
    states = dict_or_empty(checkpoint.get(_CALLBACKS))
    if _OURS not in states:
        return
    del states[_OURS]
    has_weights_only = "optimizer_states" not in checkpoint
    if has_weights_only and not states:
        del checkpoint[_CALLBACKS]


def check_readable(checkpoint: object, path: object) -> None:
    """Refuse what is not a Lightning checkpoint, or not as it was written."""
    contents = check_is_lightning(checkpoint, path)
    if KEY in contents:
        check_as_written(contents["state_dict"], contents[KEY], path)


HOLDS_WHOLE_ADAPTED_MODEL = (
    "a whole model with adapters on its layers, and does not say their arguments: the "
    "Trainer that wrote it had no LoRACallback. Adapt the model as for the training, "
    "with inject_adapters(model, LoRAConfig(...)), and call "
    "model.load_state_dict(torch.load(path)['state_dict']). Give each Trainer a "
    "LoRACallback(): then its files say all."
)
"""What such a file of Lightning's holds, in an error."""


def check_has_no_other_adapters(
    state: Mapping[Any, Any], expected: Collection[str], path: object
) -> None:
    """Refuse a full state with adapters that the model does not have: nothing says what they are."""
    if has_adapters(without(state, expected)):
        raise AdapterFileError(f"{path} holds {HOLDS_WHOLE_ADAPTED_MODEL}")


def has_adapters(state: Iterable[Any]) -> bool:
    """Whether there are names of our adapters in a state."""
    return any(last_component(str(name)).startswith("lora_A") for name in state)


def check_is_lightning(checkpoint: object, path: object) -> Mapping[str, Any]:
    """Refuse what is not a Lightning checkpoint. Return what is."""
    if not _is_lightning(checkpoint):
        raise AdapterFileError(
            f"{path} is not a Lightning checkpoint, with 'state_dict' and "
            f"{VERSION_KEY!r}. Pass one that a Trainer wrote. With a file of adapters, "
            "build the model and call load_adapter(model, path)."
        )
    return checkpoint


def _is_lightning(checkpoint: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether this has what every Lightning checkpoint has."""
    if not isinstance(checkpoint, Mapping) or VERSION_KEY not in checkpoint:
        return False
    return isinstance(checkpoint.get("state_dict"), Mapping)


def without_run_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a full checkpoint without the state of the run that wrote it, so that a new run begins from it."""
    others = without(checkpoint, _OF_THE_RUN)
    anew = {"epoch": 0, "global_step": 0, "optimizer_states": [], "lr_schedulers": []}
    return {**others, **anew}

"""What a checkpoint holds besides adapters: a merged model, or the base while a module's hook sees it."""

from typing import Any

from torch import nn

from lightning_lora.storage.state import is_hint
from lightning_lora.storage.stored import KEY
from lightning_lora.tensors.dicts import dict_or_empty, without
from lightning_lora.tensors.plain_states import state_dict

# the item of this package's entry that holds what training changed, beside a merged
# model
ADAPTERS = "adapters"
# the item that names what else is in the state: the hint to other readers, and the
# tensors of the base that are there for a hook
SHOWN = "shown"


def show_base(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the base's own tensors to a checkpoint's state, until :func:`reduce_to_adapters`.

    A user's ``on_load_checkpoint`` reads or edits the whole state, as it does without
    adapters.
    """
    adapters = checkpoint["state_dict"]
    state = {**state_dict(model), **adapters}
    checkpoint["state_dict"] = state
    checkpoint[KEY] = {**checkpoint[KEY], SHOWN: state.keys() - adapters}


def reduce_to_adapters(checkpoint: object) -> dict[str, Any]:
    """Take all but adapters out of a checkpoint's state, in place.

    Whoever reads a file begins with this, and calls it again after :func:`show_base`.

    Returns:
        The merged model that the file has for readers without this package, or an empty
        dict.
    """
    if not isinstance(checkpoint, dict):
        return {}
    description = _dict_in(checkpoint, KEY)
    merged = _take_merged_model(checkpoint, description)
    _take_shown(checkpoint, description)
    state = _dict_in(checkpoint, "state_dict")
    for hint in list(filter(is_hint, state)):
        del state[hint]
    return merged


def _dict_in(checkpoint: dict[str, Any], key: str) -> dict[str, Any]:
    """A dict in a checkpoint. It is empty if other code has written something else there, or nothing."""
    return dict_or_empty(checkpoint.get(key))


def _take_merged_model(
    checkpoint: dict[str, Any], description: dict[str, Any]
) -> dict[str, Any]:
    """Put the adapters in the place of the merged model, if a checkpoint holds both, and return the merged model."""
    if ADAPTERS not in description:
        return {}
    merged = _dict_in(checkpoint, "state_dict")
    checkpoint["state_dict"] = description.pop(ADAPTERS)
    return merged


def _take_shown(checkpoint: dict[str, Any], description: dict[str, Any]) -> None:
    """Take out what :func:`show_base` has put in, and the hint to other readers, if the file names it so."""
    shown = description.pop(SHOWN, None)
    if isinstance(shown, set):
        state = _dict_in(checkpoint, "state_dict")
        checkpoint["state_dict"] = without(state, shown)

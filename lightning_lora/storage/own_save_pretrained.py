"""A model's own ``save_pretrained``, while the model is adapted: it writes merged weights, whoever calls it."""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

from lightning_lora.errors import warn
from lightning_lora.model.view import View
from lightning_lora.storage.merged_model import (
    answering,
    checked_merged_state,
    refuse_to_tie_again,
)
from lightning_lora.tensors.names import plain_name
from lightning_lora.tensors.plain_states import StateDict
from lightning_lora.tensors.shards import reshard


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Let an adapted model's ``save_pretrained`` write what the model computes, whoever calls it."""
    reshard(model)  # FSDP2 may still show gathered parameters after an evaluation
    save = type(model).save_pretrained
    args, kwargs = _by_name(save, args, kwargs)
    given = kwargs.get("state_dict")
    view = View(model)
    # ``answering``, here or in ``save_merged``, gives the model this attribute
    is_inside_another_save = "state_dict" in vars(model)
    if is_inside_another_save or _is_plain_state(given, view):
        return save(model, *args, **kwargs)
    _leave_out_disabled_layers(view)
    refuse_to_tie_again(view)
    state = checked_merged_state(view, given or {})
    if view.layers:
        warn(
            f"save_pretrained of {type(model).__name__} writes merged weights, which "
            "are what the model computes. For the adapters alone, call "
            "save_adapter(model, path), or export_peft(model, folder)."
        )
    if given:
        kwargs = {**kwargs, "state_dict": state}
    with answering(model, state):
        return save(model, *args, **kwargs)


def _leave_out_disabled_layers(view: View) -> None:
    """Take out of the view the layers that show their base now: their updates are not merged.

    The view still names the adapters of these layers, so that they are not written.
    """
    # the view finds them by its layers: so before these change
    all_adapters = view.adapter_parameters
    view.layers = {
        name: layer for name, layer in view.layers.items() if layer.lora_enabled
    }
    view.adapter_parameters = all_adapters


def _is_plain_state(given: StateDict | None, view: View) -> bool:
    """Whether a caller has given a state without adapters, to be written as it is."""
    if given is None:
        return False
    return view.adapter_parameters.keys().isdisjoint(map(plain_name, given))


def _by_name(
    save: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with their names, but for the folder: so a state is found that has its position alone."""
    parameters = signature(save).parameters.values()
    names = [
        each.name for each in parameters if each.kind is Parameter.POSITIONAL_OR_KEYWORD
    ]
    by_position = args[1:]  # after the folder
    # the first two are self and the folder
    named = dict(zip(names[2:], by_position, strict=False))
    has_too_many = len(named) < len(by_position)
    # the call is wrong, which the method itself says
    if has_too_many or not named.keys().isdisjoint(kwargs):
        return args, kwargs
    return args[:1], {**named, **kwargs}

"""A model's own ``save_pretrained``, while the model is adapted: it writes merged weights, whoever calls it."""

from collections.abc import Callable
from functools import cached_property
from inspect import Parameter, signature
from typing import Any

from torch import nn

from lightning_lora.errors import warn
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View
from lightning_lora.storage.merged_model import (
    answering,
    checked_merged_state,
    refuse_to_tie_again,
)
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.names import plain_name
from lightning_lora.tensors.plain_states import StateDict
from lightning_lora.tensors.shards import reshard


def save_pretrained(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Let an adapted model's ``save_pretrained`` write what the model computes, whoever calls it."""
    reshard(model)  # FSDP2 may still show gathered parameters after an evaluation
    save = type(model).save_pretrained
    args, kwargs = _by_name(save, args, kwargs)
    given = kwargs.get("state_dict")
    view = _ViewInEffect(model)
    # ``answering``, here or in ``save_merged``, gives the model this attribute
    is_inside_another_save = "state_dict" in vars(model)
    if is_inside_another_save or _is_plain_state(given, view):
        return save(model, *args, **kwargs)
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


class _ViewInEffect(View):
    """A view without the layers that show their base now: their updates are not merged.

    The adapters of these layers are known to it all the same, so that they are not
    written.
    """

    @cached_property
    def layers(self) -> dict[str, LoRALayer]:
        """The adapted layers whose updates have their effect."""
        return where(View(self.model).layers, _is_in_effect)

    @cached_property
    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of all adapters, in effect or not."""
        return View(self.model).adapter_parameters


def _is_in_effect(layer: LoRALayer) -> bool:
    """Whether a layer computes with its update now."""
    return layer.lora_enabled


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

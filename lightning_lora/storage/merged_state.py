"""The state of a merged model, while its adapters stay on their layers."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import HAS_UPDATE, LoRALayer
from lightning_lora.layers.each_kind.tokens import tied_to
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.changed_since_merge import refuse_changed_since_merge
from lightning_lora.model.mergeable import refuse_unmergeable
from lightning_lora.model.view import View
from lightning_lora.private import STATE_NOTES
from lightning_lora.storage.state import own_adapters_in
from lightning_lora.tensors.dicts import names_of_each, only, renamed, without
from lightning_lora.tensors.names import join, own_parameter, plain_name, set_tensor
from lightning_lora.tensors.plain_states import StateDict
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.values import detached


def merged_state(
    view: View, changed: StateDict
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the state dict that a model has after ``merge_adapters``.

    Merged weights are in the host's memory.

    Args:
        view: The model.
        changed: Values to take in place of the model's own, by name: of adapters too.
            It may be empty.

    Returns:
        The state, and the share of each layer's update that is lost to rounding.
    """
    if view.is_merged:
        refuse_changed_since_merge(view)
        return _with_updates_noted(view, view.model.state_dict()), {}
    changed = renamed(changed, plain_name)
    _refuse_spread_weights(view, changed)
    refuse_computed_weights(view)
    refuse_unmergeable(view)
    with replaced_values(view, changed):
        merged, lost = _merged_weights_on_host(view)
    return _with_updates_noted(view, _state_with(view, changed, merged)), lost


def _refuse_spread_weights(view: View, changed: StateDict) -> None:
    """Refuse a model whose weights are in no process as a whole."""
    parameters = {**view.parameters, **only(changed, view.parameters)}
    if any(is_dtensor(value) for value in parameters.values()):
        raise AdapterStateError(
            f"{view.title} is spread over processes. Call save_adapter(model, path) in "
            "each, then lightning-lora merge BASE FILE OUT. Or gather its state for "
            "save_pretrained(folder, state_dict=state)."
        )


def _state_with(view: View, changed: StateDict, merged: Mapping[str, Tensor]) -> Any:
    """The model's state dict without adapters, with the changed and the merged values.

    Changed values without a place in the state dict are added at its end.
    """
    state: Any = view.model.state_dict(keep_vars=True)
    # code of the model may have given the adapters other names in its state
    adapters_in_state = own_adapters_in(view, state)
    for name in adapters_in_state:
        del state[name]
    _refuse_without_place(merged, state, view.title)
    adapter_names = {*view.adapter_parameters, *map(plain_name, adapters_in_state)}
    new_values = without({**changed, **merged}, adapter_names)
    for name, value in state.items():
        state[name] = detached(new_values.pop(plain_name(name), value))
    values_without_place = new_values  # the loop has taken out all others
    state.update(values_without_place)
    return state


def _refuse_without_place(
    merged: Mapping[str, Tensor], state: StateDict, title: str
) -> None:
    """Refuse a state dict that a model's own code has changed: without the names of merged weights."""
    absent = merged.keys() - set(map(plain_name, state))
    if absent:
        raise AdapterStateError(
            f"The state dict of {title} does not hold {listed(sorted(absent))} under "
            "their own names, so that no update can be put there. Call "
            "merge_adapters(model) and save its state dict."
        )


def _with_updates_noted(view: View, state: Any) -> dict[str, Any]:
    """The state of a merged model, with ``HAS_UPDATE`` in torch's notes on the model and on each merged layer.

    By these, an adapted model that loads the state knows that its weights contain the
    updates.
    """
    merged_modules = {"", *view.matrices}
    notes = dict(getattr(state, STATE_NOTES, {}))
    for name, note in notes.items():
        if plain_name(name) in merged_modules:
            notes[name] = {**note, HAS_UPDATE: True}
    noted: Any = OrderedDict(state)
    setattr(noted, STATE_NOTES, notes)
    return noted  # type: ignore[no-any-return]  # a dict


@contextmanager
def replaced_values(view: View, values: StateDict) -> Iterator[None]:
    """Give the adapters and their weights other values, and their own ones back."""
    with ExitStack() as undo, torch.no_grad():
        for name, layer in view.layers.items():
            _replace_values_of_layer(name, layer, values, undo)
        yield


def _replace_values_of_layer(
    name: str, layer: LoRALayer, values: StateDict, undo: ExitStack
) -> None:
    """Give one adapter and its weights the values that there are for them.

    Some of these may be on another device than the model. All go to that of the first
    weight.
    """
    leaves = (*layer.lora_weights(), *layer.lora_specs())
    first_weight = values.get(join(name, leaves[0]), own_parameter(layer, leaves[0]))
    for leaf in leaves:
        parameter = own_parameter(layer, leaf)
        value = values.get(join(name, leaf), parameter).to(
            first_weight.device, parameter.dtype
        )
        if value is not parameter:
            undo.callback(set_tensor, layer, leaf, parameter)
            set_tensor(layer, leaf, nn.Parameter(value, requires_grad=False))


def _merged_weights_on_host(view: View) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The merged weights under all of their names.

    Also the share of each layer's update that is lost to rounding.
    """
    merged = dict[str, Tensor]()
    lost = dict[str, float]()
    names_of = _names_of_layers(view)
    with torch.inference_mode(False), torch.no_grad():
        for first_name, layer in view.layers.items():
            for weight in layer.lora_weights():
                values, share = layer.lora_merged_weight(weight)
                lost[first_name] = max(share, lost.get(first_name, 0.0))
                on_host = values.detach().cpu()
                for name in names_of[layer]:
                    merged[join(name, weight)] = on_host
    return merged, lost


def _names_of_layers(view: View) -> dict[nn.Module, list[str]]:
    """All names of each layer, and of the modules that are tied to it: its weights have all these names."""
    owners = {name: tied_to(module) for name, module in view.modules.items()}
    return names_of_each(owners)

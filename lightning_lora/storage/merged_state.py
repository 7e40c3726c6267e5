"""The state of a merged model, while its adapters stay on their layers. And the base again, from such a state."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.functional.dtypes import wide
from lightning_lora.layers import HAS_UPDATE, LoRALayer
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.changed_since_merge import refuse_changed_since_merge
from lightning_lora.model.mergeable import refuse_unmergeable
from lightning_lora.model.view import View
from lightning_lora.private import STATE_NOTES
from lightning_lora.storage.state import own_adapters_in
from lightning_lora.tensors.dicts import names_of_each, only, renamed, without
from lightning_lora.tensors.names import join, own_parameter, plain_module, plain_name, set_parameter
from lightning_lora.tensors.plain_states import StateDict
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.values import detached, replace_values


def merged_state(view: View, changed: StateDict) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the state dict that a model has after ``merge_adapters``. Merged weights are in the host's memory.

    Args:
        view: The model.
        changed: Values to take in place of the model's own, by name: of adapters too. It may be empty.

    Returns:
        The state, and the share of each layer's update that is lost to rounding.
    """
    if view.is_merged:
        refuse_changed_since_merge(view)
        state = plain_module(view.model).state_dict()
        return _noted(view, state), {}
    changed = renamed(changed, plain_name)
    _refuse_spread_weights(view, changed)
    refuse_computed_weights(view)
    refuse_unmergeable(view)
    with _replaced_values(view, changed):
        merged, lost = _merged_weights_on_host(view)
    return _noted(view, _state_with(view, changed, merged)), lost


def _refuse_spread_weights(view: View, changed: StateDict) -> None:
    """Refuse a model whose weights are in no process as a whole."""
    parameters = {**view.parameters, **only(changed, view.parameters)}
    if any(is_dtensor(value) for value in parameters.values()):
        title = type(plain_module(view.model)).__name__
        raise AdapterStateError(
            f"{title} is spread over processes. Call save_adapter(model, path) in each, then "
            "lightning-lora merge BASE FILE OUT. Or gather its state for save_pretrained(folder, state_dict=state)."
        )


def _state_with(view: View, changed: StateDict, merged: Mapping[str, Tensor]) -> Any:
    """The model's state dict without adapters, with other values."""
    model = plain_module(view.model)
    state: Any = model.state_dict(keep_vars=True)
    adapters = own_adapters_in(view, state)
    for name in adapters:
        del state[name]
    _refuse_without_place(merged, state, type(model).__name__)
    adapter_names = {*view.adapter_parameters, *map(plain_name, adapters)}
    new_values = without({**changed, **merged}, adapter_names)
    for name, value in state.items():
        state[name] = detached(new_values.get(plain_name(name), value))
    added = without(new_values, set(map(plain_name, state)))
    state.update(added)
    return state


def _refuse_without_place(merged: Mapping[str, Tensor], state: StateDict, title: str) -> None:
    """Refuse a state dict that a model's own code has changed: without the names of merged weights."""
    absent = merged.keys() - set(map(plain_name, state))
    if absent:
        raise AdapterStateError(
            f"The state dict of {title} does not hold {listed(sorted(absent))} under their own names, so that no "
            "update can be put there. Call merge_adapters(model) and save its state dict."
        )


def _noted(view: View, state: Any) -> dict[str, Any]:
    """Note each merged layer, and the model, in torch's notes of a state dict."""
    merged_modules = {"", *view.matrices}
    notes = dict(getattr(state, STATE_NOTES, {}))
    for name, note in notes.items():
        if plain_name(name) in merged_modules:
            notes[name] = {**note, HAS_UPDATE: True}
    noted: Any = OrderedDict(state)
    setattr(noted, STATE_NOTES, notes)
    return noted  # type: ignore[no-any-return]  # a dict


@contextmanager
def _replaced_values(view: View, values: StateDict) -> Iterator[None]:
    """Give the adapters and their weights other values, and their own ones back."""
    with ExitStack() as undo, torch.no_grad():
        for name, layer in view.layers.items():
            _replace_values_of_layer(name, layer, values, undo)
        yield


def _replace_values_of_layer(name: str, layer: LoRALayer, values: StateDict, undo: ExitStack) -> None:
    """Give one adapter and its weights other values, where these are. All go to the device of the first weight."""
    leaves = (*layer.lora_weights(), *layer.lora_specs())
    first_weight = values.get(join(name, leaves[0]), own_parameter(layer, leaves[0]))
    for leaf in leaves:
        parameter = own_parameter(layer, leaf)
        value = values.get(join(name, leaf), parameter).to(first_weight.device, parameter.dtype)
        if value is not parameter:
            undo.callback(set_parameter, layer, leaf, parameter)
            set_parameter(layer, leaf, nn.Parameter(value, requires_grad=False))


def _merged_weights_on_host(view: View) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The merged weights under all of their names. Also the share of each layer's update that is lost to rounding."""
    merged = dict[str, Tensor]()
    lost = dict[str, float]()
    names = _names_of_weights(view)
    with torch.inference_mode(False), torch.no_grad():
        for first_name, layer in view.layers.items():
            for weight in layer.lora_weights():
                values, share = layer.lora_merged_weight(weight)
                lost[first_name] = max(share, lost.get(first_name, 0.0))
                on_host = values.detach().cpu()
                for name in names[layer]:
                    merged[join(name, weight)] = on_host
    return merged, lost


def _names_of_weights(view: View) -> dict[nn.Module, list[str]]:
    """All names under which the weights of each module are used: also those of a layer that is tied to it."""
    owners = {name: _layer_that_adapts(module) for name, module in view.modules.items()}
    return names_of_each(owners)


def _layer_that_adapts(module: nn.Module) -> nn.Module:
    """The layer whose adapter a module computes with: its own, or of one that it is tied to."""
    owners: tuple[nn.Module] = vars(module).get("lora_tied_to", (module,))
    return owners[0]


# The base again


def take_updates_out(view: View, merged: StateDict, changed: StateDict) -> bool:
    """Take a file's updates out of its merged weights. The weights are the base's then, up to rounding."""
    adapters = only(changed, view.adapter_parameters)
    if not _can_be_taken_out(view, renamed(merged, plain_name), adapters):
        return False
    with _replaced_values(view, adapters), torch.no_grad():
        for layer in view.layers.values():
            _take_update_out(layer)
    return True


def _take_update_out(layer: LoRALayer) -> None:
    """Subtract the update of a layer from its weights."""
    for name in layer.lora_weights():
        weight = own_parameter(layer, name)
        update = layer.lora_effective_weight(name).sub_(weight)
        base = weight.to(wide(weight.dtype)) - update
        replace_values(weight, base.to(weight.dtype))
    layer.lora_weights_changed()


def _can_be_taken_out(view: View, merged: StateDict, adapters: StateDict) -> bool:
    """Whether a file has updates for these layers, and the model the file's merged weights and no adapters yet."""
    have_one_shape = _shapes_of(adapters) == _shapes_of(view.adapter_parameters)
    return have_one_shape and _is_exact_sum(view) and view.is_fresh() and _has_weights(view, merged)


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of tensors by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def _is_exact_sum(view: View) -> bool:
    """Whether an update can be subtracted again: not from a scaled, rounded or sharded sum."""
    uses_dora = any(layer.lora_settings.use_dora for layer in view.layers.values())
    is_rounded = any(_is_narrow(parameter) for parameter in view.base_parameters.values())
    return not (uses_dora or is_rounded or view.is_sharded)


def _is_narrow(parameter: Tensor) -> bool:
    """Whether it is less precise than float32."""
    return parameter.is_floating_point() and parameter.element_size() < 4


def _has_weights(view: View, merged: StateDict) -> bool:
    """Whether all weights of the model are those of a file."""
    if not view.base_parameters.keys() <= merged.keys():
        return False
    return all(torch.equal(parameter.cpu(), merged[name].cpu()) for name, parameter in view.base_parameters.items())

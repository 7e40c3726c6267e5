"""The state of a merged model, while its adapters stay on their layers. And the base again, from such a state."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.functional.update import wide
from lightning_lora.layers import HAS_UPDATE, LoRALayer
from lightning_lora.model.as_adapted import check_weights
from lightning_lora.model.merge import check_mergeable
from lightning_lora.model.merged import check_as_merged
from lightning_lora.model.view import View
from lightning_lora.private import STATE_NOTES
from lightning_lora.tensors.named import names_by, only, renamed, where, without
from lightning_lora.tensors.names import join, own_parameter, plain_module, plain_name, set_parameter
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.values import detached, replace_values


def merged_state(view: View, changed: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the state dict that a model has after ``merge_adapters``. Merged weights are in the host's memory.

    Args:
        view: The model.
        changed: Values to take in place of the model's own, by name: of adapters too.

    Returns:
        The state, and the share of each layer's update that is lost to rounding.
    """
    if view.is_merged:
        check_as_merged(view)
        state = plain_module(view.model).state_dict()
        return _noted(view, state), {}
    changed = renamed(changed or {}, plain_name)
    _refuse_spread(view, changed)
    check_weights(view)
    check_mergeable(view)
    with _showing(view, changed):
        merged, lost = _merged_weights(view)
    return _noted(view, _state_with(view, changed, merged)), lost


def _refuse_spread(view: View, changed: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are in no process as a whole."""
    present = {**view.parameters, **changed}
    if where(only(present, view.parameters), is_dtensor):
        title = type(plain_module(view.model)).__name__
        raise AdapterStateError(
            f"{title} is spread over processes. Call save_adapter(model, path) in each, then "
            "lightning-lora merge BASE FILE OUT. Or gather its state for save_pretrained(folder, state_dict=state)."
        )


def _state_with(view: View, changed: Mapping[str, Any], merged: Mapping[str, Tensor]) -> Any:
    """The model's state dict without adapters, with other values."""
    new_values = without({**changed, **merged}, view.adapters)
    adapters = {id(parameter) for parameter in view.adapters.values()}  # a hook may have given them other names
    model = plain_module(view.model)
    state: Any = model.state_dict(keep_vars=True)
    for name, value in list(state.items()):
        new_value = new_values.pop(plain_name(name), value)
        if id(value) in adapters:
            del state[name]
        else:
            state[name] = detached(new_value)
    absent = merged.keys() & new_values.keys()
    if absent:
        raise AdapterStateError(
            f"The state dict of {type(model).__name__} does not hold {listed(sorted(absent))} under their own names, "
            "so that no update can be put there. Call merge_adapters(model) and save its state dict."
        )
    state.update(new_values)
    return state


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
def _showing(view: View, changed: Mapping[str, Any]) -> Iterator[None]:
    """Give the adapters and their weights other values, and their own ones back."""
    with ExitStack() as undo, torch.no_grad():
        for name, layer in view.layers.items():
            _show(view, name, layer, changed, undo)
        yield


def _show(view: View, name: str, layer: LoRALayer, changed: Mapping[str, Any], undo: ExitStack) -> None:
    """Give one adapter and its weights other values, where these are."""
    first = join(name, layer.lora_weights()[0])
    device = changed.get(first, view.parameters[first]).device
    for leaf in (*layer.lora_weights(), *layer.lora_roles()):
        parameter = own_parameter(layer, leaf)
        value = changed.get(join(name, leaf), parameter).to(device, parameter.dtype)
        if value is not parameter:
            undo.callback(set_parameter, layer, leaf, parameter)
            set_parameter(layer, leaf, nn.Parameter(value, requires_grad=False))


def _merged_weights(view: View) -> tuple[dict[str, Tensor], dict[str, float]]:
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
    owners = {name: vars(module).get("lora_tied_to", (module,))[0] for name, module in view.modules.items()}
    return names_by(owners)


# The base again


def take_updates_out(view: View, merged: Mapping[str, Any], changed: Mapping[str, Any]) -> bool:
    """Take a file's updates out of its merged weights. The weights are the base's then, up to rounding."""
    merged = renamed(merged, plain_name)
    if not _fit(view, changed) or not _can_be_taken_out(view) or not view.is_fresh():
        return False
    if not _has_weights(view, merged):
        return False
    with _showing(view, only(changed, view.adapters)), torch.no_grad():
        for layer in view.layers.values():
            for name in layer.lora_weights():
                weight = own_parameter(layer, name)
                update = layer.lora_effective_weight(name).sub_(weight)
                base = weight.to(wide(weight.dtype)) - update
                replace_values(weight, base.to(weight.dtype))
            layer.lora_weights_changed()
    return True


def _fit(view: View, changed: Mapping[str, Any]) -> bool:
    """Whether a file has all adapters, in the shapes of the model's."""
    if not changed.keys() >= view.adapters.keys():
        return False
    return all(changed[name].shape == parameter.shape for name, parameter in view.adapters.items())


def _can_be_taken_out(view: View) -> bool:
    """Whether an update can be subtracted again: not from a scaled, rounded or sharded sum."""
    if any(layer.lora_settings.use_dora for layer in view.layers.values()):
        return False
    return not any(_is_narrow_or_spread(parameter) for parameter in view.base.values())


def _is_narrow_or_spread(parameter: Tensor) -> bool:
    """Whether it is less precise than float32, or spread over processes."""
    is_narrow = parameter.is_floating_point() and parameter.element_size() < 4
    return is_narrow or is_dtensor(parameter)


def _has_weights(view: View, merged: Mapping[str, Any]) -> bool:
    """Whether all weights of the model are those of a file."""
    for name, parameter in view.base.items():
        if name not in merged or not torch.equal(parameter.cpu(), merged[name].cpu()):
            return False
    return True

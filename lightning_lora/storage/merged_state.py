"""The state dict of the merged model, without a merge."""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.functional.update import wide
from lightning_lora.layers import HAS_UPDATE
from lightning_lora.model.attach import check_weights
from lightning_lora.model.merge import check_mergeable, tied_weights
from lightning_lora.model.merged import check_as_merged
from lightning_lora.model.view import View
from lightning_lora.tensors.names import join, own_parameter, plain_module, plain_name
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.values import replace_values


def merged_state(view: View, changed: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the state dict that a model has after ``merge_adapters``.

    The model does not change. Merged weights are in the host's memory.

    Args:
        view: A model with adapters, merged or not.
        changed: What training changed, by name, if it is not to be read from the model: averages, for example.

    Returns:
        The state dict, and the share of each layer's update that is lost to rounding. In the state dict is a note on
        each merged layer, so that an adapted layer that loads it does not count the update twice.

    Raises:
        AdapterStateError: the updates cannot be merged.
    """
    model = plain_module(view.model)
    if view.is_merged:
        check_as_merged(view.model)
        return _noted(view, model.state_dict()), {}
    _check_mergeable(view)
    changed = changed or {}
    with _showing(view, changed):
        merged, lost = _merged_weights(view)
    added = {id(p) for p in view.adapters.values()}
    state: Any = model.state_dict(keep_vars=True)
    for name in [name for name, value in state.items() if id(value) in added]:
        del state[name]
    own = {plain_name(name): name for name in state}
    if absent := [name for name in merged if name not in own]:
        raise AdapterStateError(
            f"The state dict of {type(model).__name__} does not hold {listed(absent)} under their own names, so that "
            "no update can be put there. Call merge_adapters(model) and save its state dict."
        )
    others = {name: value for name, value in changed.items() if name not in view.adapters}
    state.update({own.get(name, name): value for name, value in {**others, **merged}.items()})
    for name, value in state.items():
        state[name] = value.detach() if isinstance(value, Tensor) else value
    return _noted(view, state), lost


def _noted(view: View, state: Any) -> dict[str, Any]:
    """Add a note on each merged layer, and on the model, to torch's own notes in a state dict."""
    noted: Any = OrderedDict(state)
    merged, notes = {"", *view.adapted_parts}, getattr(state, "_metadata", {})
    noted._metadata = {
        name: {**note, HAS_UPDATE: True} if plain_name(name) in merged else note for name, note in notes.items()
    }
    return noted  # type: ignore[no-any-return]  # a dict


@contextmanager
def _showing(view: View, changed: Mapping[str, Any]) -> Iterator[None]:
    """Give the adapters other values, and their own ones back."""
    with ExitStack() as undo, torch.no_grad():
        for name, p in view.adapters.items():
            value = changed.get(name, p)
            if value.data_ptr() != p.data_ptr():
                undo.callback(replace_values, p, p.data)
                replace_values(p, value.to(p))
        yield


def _merged_weights(view: View) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The merged weights under all of their names, and the share of each layer's update that is lost to rounding."""
    merged, lost = dict[str, Tensor](), dict[str, float]()
    with torch.inference_mode(False), torch.no_grad():
        for first, layer in view.layers.items():
            names = [name for name, module in view.modules.items() if module is layer]
            for weight in layer.lora_weights():
                values, share = layer.lora_merged_weight(weight)
                lost[first] = max(share, lost.get(first, 0.0))
                host = values.detach().cpu()
                merged |= {join(name, weight): host for name in names}
    return merged, lost


def untied(view: View) -> list[str]:
    """Return the layers with tied weights that a merge unties."""
    if view.is_merged:
        return [weight.layer for weight in view.merged if isinstance(weight.base, nn.Parameter)]
    return [name for name, weights in tied_weights(view).items() if weights]


# The base again


def take_updates_out(view: View, merged: Mapping[str, Any], changed: Mapping[str, Any]) -> bool:
    """Take a file's updates out of its merged weights.

    The weights are the base's then, up to rounding.

    Args:
        view: A model with new adapters.
        merged: The merged state in the file.
        changed: What training changed, in the file.

    Returns:
        Whether the model holds exactly the merged weights, so that they were taken out. Otherwise it does not change:
        so with DoRA, which loses the weights' norms, and in half precision, which would round too much.
    """
    merged = {plain_name(name): value for name, value in merged.items()}
    fits = changed.keys() >= view.adapters.keys() and all(changed[n].shape == p.shape for n, p in view.adapters.items())
    is_exact = not any(layer.lora_settings.use_dora for layer in view.layers.values())
    is_exact &= not any(is_dtensor(p) or (p.is_floating_point() and p.element_size() < 4) for p in view.base.values())
    if not fits or not is_exact or not view.is_fresh():
        return False
    if not all(name in merged and torch.equal(p.cpu(), merged[name].cpu()) for name, p in view.base.items()):
        return False
    with _showing(view, changed), torch.no_grad():
        for layer in view.layers.values():
            for name in layer.lora_weights():
                own = own_parameter(layer, name)
                update = layer.lora_effective_weight(name).sub_(own)
                replace_values(own, (own.to(wide(own.dtype)) - update).to(own.dtype))
            layer.lora_weights_changed()
    return True


# Checks


def _check_mergeable(view: View) -> None:
    if any(is_dtensor(p) for p in view.parameters.values()):
        raise AdapterStateError(
            f"{type(view.model).__name__} is spread over processes, so none of them holds all its weights. Call "
            "save_adapter(model, path) in each process. Then merge the file into the base: lightning-lora merge BASE "
            "FILE OUT."
        )
    check_weights(view)
    check_mergeable(view)


def check_finite(view: View, state: Mapping[str, Any]) -> None:
    """Refuse NaN and infinite adapters and merged weights.

    Args:
        view: A model with adapters.
        state: Its merged state.

    Raises:
        AdapterStateError: there are such values.
    """
    if broken := view.diverged():
        raise AdapterStateError(
            f"{listed(broken)} of {type(view.model).__name__} hold NaN or infinite values: the training has diverged. "
            "Train again with a lower learning rate, or use an earlier checkpoint."
        )
    weights = {join(name, part.weight) for name, parts in view.adapted_parts.items() for part in parts}
    for name, value in state.items():
        if plain_name(name) in weights and not value.isfinite().all():
            raise AdapterStateError(
                f"Merged, {plain_name(name)!r} would hold values that {value.dtype} cannot. Convert the model first: "
                "model.to(torch.float32)."
            )

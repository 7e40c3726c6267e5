"""A merged model: whether its weights are as the merge left them."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from lightning_lora.base.base_tensors import MergedTensor
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import Adapter, LoRALayer, put_on
from lightning_lora.model.view import View
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join
from lightning_lora.tensors.shards import agreed, is_dtensor
from lightning_lora.tensors.values import replace_values


def check_as_merged(view: View) -> None:
    """Raise an error if a merged model's weights have changed."""
    if not is_as_merged(view):
        raise AdapterStateError(
            f"The weights of {view.title} were changed since its adapters were merged into them, so neither these nor "
            "its base can be restored. Load both again, or keep the weights as they are: remove_adapters(model)."
        )


def is_as_merged(view: View) -> bool:
    """Whether a model has its merged weights, perhaps converted, or is not merged. Collective for a sharded one."""
    if not view.is_merged:
        return True
    check_own(view)
    has_changed_here = not _is_as_merged_here(view)
    has_changed_anywhere = agreed([has_changed_here], list(view.parameters.values()))
    return not any(has_changed_anywhere)


def check_own(view: View) -> None:
    """Refuse merged layers that another model shares, and whose adapters are on them."""
    taken = [name for name in view.record.merged if isinstance(view.modules.get(name), LoRALayer)]
    if taken:
        raise AdapterStateError(
            f"{listed(taken)} of {view.title} have the adapters of another model that shares them, and "
            "cannot get their own back. Call remove_adapters on that model first, or give each model layers of its own."
        )


def _is_as_merged_here(view: View) -> bool:
    """Whether the weights are as merged. Of spread ones, those of this process are."""
    for name, others in view.record.base.beside_merged().items():
        if name not in view.parameters or not others.seen.is_alike(view.parameters[name]):
            return False
    return all(_is_layer_as_merged(view, name, adapter) for name, adapter in view.record.merged.items())


def _is_layer_as_merged(view: View, layer: str, adapter: Adapter) -> bool:
    """Whether the weights of a merged layer are as merged, perhaps converted."""
    weights = dict[str, nn.Parameter]()
    are_still = True
    for weight in adapter.weights:
        name = join(layer, weight)
        if name not in view.parameters:  # prune or weight_norm computes it
            return False
        merged = view.record.base.merged_tensor(name)
        weights[weight] = view.parameters[name]
        if not _is_tie_present(view, merged, weights[weight]):
            return False
        are_still = are_still and _is_still(merged, weights[weight])
    return are_still or _is_merged_anew(view, layer, adapter, weights)


def _is_tie_present(view: View, merged: MergedTensor, shown: nn.Parameter) -> bool:
    """Whether the other use of a weight that was tied is still there, on the same device in the same dtype."""
    tied = merged.base
    if merged.tied_seen is None or tied is None:
        return True
    is_present = any(tied is parameter for parameter in view.parameters.values())
    return is_present and tied.dtype == shown.dtype and tied.device == shown.device


def _is_still(merged: MergedTensor, shown: nn.Parameter) -> bool:
    """Whether a merged weight, and its other use if it was tied, have the values that the merge left."""
    if merged.tied_seen is not None and merged.base is not None and not merged.tied_seen.is_still(merged.base):
        return False
    return merged.seen.is_still(shown)


def _is_merged_anew(view: View, layer: str, adapter: Adapter, weights: Mapping[str, nn.Parameter]) -> bool:
    """Whether a layer's weights are what a merge gives, perhaps converted: merge again, and compare."""
    if any(weight.is_meta or is_dtensor(weight) for weight in weights.values()):
        return False
    shown = {name: weight.data for name, weight in weights.items()}
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        for name, weight in weights.items():
            undo.callback(replace_values, weight, shown[name])
        _show_base_as_merged(view, layer, adapter, weights)
        module: Any = view.modules[layer]
        put_on(module, adapter)
        undo.callback(module.lora_detach)
        merged = {name: module.lora_merged_weight(name)[0] for name in weights}
    return all(digest(merged[name].to(value.dtype)) == digest(value) for name, value in shown.items())


def _show_base_as_merged(view: View, layer: str, adapter: Adapter, weights: Mapping[str, nn.Parameter]) -> None:
    """Give weights the base's values in the dtypes of the merge, and bring the adapter to their device."""
    device = next(iter(weights.values())).device
    for parameter in adapter.parameters.values():
        replace_values(parameter, parameter.data.to(device))
    bases = view.record.base.merged_bases(layer, adapter.weights)
    for name, weight in weights.items():
        merged = view.record.base.merged_tensor(join(layer, name))
        replace_values(weight, bases[name].data.to(weight.device, merged.seen.dtype))

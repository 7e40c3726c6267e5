"""A merged model: whether its weights are as the merge left them."""

from collections.abc import Mapping

import torch
from torch import nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LoRALayer, put_on
from lightning_lora.model.record import Merge
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
    merge = view.record.merge if view.is_merged else None
    if merge is None:
        return True
    return not any(agreed([not _is_as_merged_here(view, merge)], list(view.parameters.values())))


def check_own(view: View) -> None:
    """Refuse merged layers that another model shares, and whose adapters are on them."""
    taken = [name for name in view.record.merged if isinstance(view.modules.get(name), LoRALayer)]
    if taken:
        raise AdapterStateError(
            f"{listed(taken)} of {view.title} have the adapters of another model that shares them, and "
            "cannot get their own back. Call remove_adapters on that model first, or give each model layers of its own."
        )


def _is_as_merged_here(view: View, merge: Merge) -> bool:
    """Whether the weights are as merged. Of spread ones, those of this process are."""
    check_own(view)
    for name, seen in merge.others.items():
        if name not in view.parameters or not seen.is_alike(view.parameters[name]):
            return False
    return all(_is_layer_as_merged(view, merge, name) for name in merge.adapters)


def _is_layer_as_merged(view: View, merge: Merge, name: str) -> bool:
    adapter, is_still, weights = merge.adapters[name], True, dict[str, nn.Parameter]()
    for weight, base in adapter.bases.items():
        key = join(name, weight)
        if key not in view.parameters:  # prune or weight_norm computes it
            return False
        value = weights[weight] = view.parameters[key]
        if key in merge.tied:  # its other use must still be there
            is_present = any(base is p for p in view.parameters.values())
            if not is_present or base.dtype != value.dtype or base.device != value.device:
                return False
            is_still = is_still and merge.tied[key].is_still(base)
        is_still = is_still and merge.weights[key].is_still(value)
    return is_still or _is_merged_anew(merge, name, view.modules[name], weights)


def _is_merged_anew(merge: Merge, name: str, layer: nn.Module, weights: Mapping[str, nn.Parameter]) -> bool:
    """Whether a layer's weights are what a merge gives, perhaps converted: merge again, and compare."""
    adapter = merge.adapters[name]
    if any(weight.is_meta or is_dtensor(weight) for weight in weights.values()):
        return False
    shown = {weight: value.data for weight, value in weights.items()}
    device = next(iter(weights.values())).device
    with torch.inference_mode(False), torch.no_grad():
        for parameter in adapter.parameters.values():
            replace_values(parameter, parameter.data.to(device))
        try:
            for weight, value in weights.items():
                dtype = merge.weights[join(name, weight)].dtype
                replace_values(value, adapter.bases[weight].data.to(value.device, dtype))
            put_on(layer, adapter)
            try:
                anew = {weight: layer.lora_merged_weight(weight)[0] for weight in weights}  # type: ignore[operator]
            finally:
                layer.lora_detach()  # type: ignore[operator]
        finally:
            for weight, value in weights.items():
                replace_values(value, shown[weight])
    return all(digest(anew[weight].to(value.dtype)) == digest(value) for weight, value in shown.items())

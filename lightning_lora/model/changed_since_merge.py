"""A merged model: whether its weights are as the merge left them."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LayerAdapter, LoRALayer, put_on
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, only
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join, names_joined, own_parameter
from lightning_lora.tensors.shards import is_dtensor, true_anywhere
from lightning_lora.tensors.values import replace_values


def refuse_changed_since_merge(view: View) -> None:
    """Raise an error if a merged model's weights have changed."""
    if not is_as_merged(view):
        raise AdapterStateError(
            f"The weights of {view.title} were changed since its adapters were merged "
            "into them, so neither these nor its base can be restored. Load both "
            "again, or keep the weights as they are: remove_adapters(model)."
        )


def is_as_merged(view: View) -> bool:
    """Whether a model has its merged weights, perhaps converted, or is not merged.

    Collective for a sharded one.
    """
    if not view.is_merged:
        return True
    refuse_layers_of_another_model(view)
    has_changed_here = not _is_as_merged_here(view)
    (has_changed_anywhere,) = true_anywhere(
        [has_changed_here], list(view.parameters.values())
    )
    return not has_changed_anywhere


def refuse_layers_of_another_model(view: View) -> None:
    """Refuse merged layers that another model shares, and whose adapters are on them."""
    adapted = of_type(view.modules, LoRALayer)
    taken = only(adapted, view.record.merged_layer_adapters)
    if taken:
        raise AdapterStateError(
            f"{listed(taken)} of {view.title} have the adapters of another model that "
            "shares them, and cannot get their own back. Call remove_adapters on that "
            "model first, or give each model layers of its own."
        )


def _is_as_merged_here(view: View) -> bool:
    """Whether the weights are as merged. Of spread ones, those of this process are."""
    for name, seen in view.record.base.after_merge.seen_without_update.items():
        if name not in view.parameters or not seen.may_have_same_values(
            view.parameters[name]
        ):
            return False
    return all(
        _is_layer_as_merged(view, layer, adapter)
        for layer, adapter in view.record.merged_layer_adapters.items()
    )


def _is_layer_as_merged(view: View, layer: str, adapter: LayerAdapter) -> bool:
    """Whether the weights of a merged layer are as merged, perhaps converted, and tied to the same ones."""
    names = names_joined(layer, adapter.weights)
    shown = only(view.parameters, names)
    if len(shown) < len(names):  # prune or weight_norm computes the others
        return False
    tied = only(view.record.base.after_merge.seen_tied, names)
    if not all(_is_tie_present(view, name) for name in tied):
        return False
    seen = view.record.base.after_merge.seen
    has_same_values = all(
        seen[name].has_same_values(view.parameters[name]) for name in names
    )
    return has_same_values or _merge_again_and_compare(view, layer, adapter)


def _is_tie_present(view: View, name: str) -> bool:
    """Whether the other use of a weight that was tied is still there, on the same device in the same dtype."""
    shown = view.parameters[name]
    tied = view.record.base.after_merge.bases[name]
    is_present = tied in set(view.parameters.values())
    return is_present and tied.dtype == shown.dtype and tied.device == shown.device


def _merge_again_and_compare(view: View, layer: str, adapter: LayerAdapter) -> bool:
    """Merge a layer again. Return whether this gives its weights, perhaps converted.

    The weights and the class are as before afterwards. The adapter stays on the layer's
    device.
    """
    module: Any = view.modules[layer]
    weights = {name: own_parameter(module, name) for name in adapter.weights}
    if any(weight.is_meta or is_dtensor(weight) for weight in weights.values()):
        return False
    shown = dict[str, Tensor]()
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        for name, weight in weights.items():
            shown[name] = weight.data
            undo.callback(replace_values, weight, weight.data)
        _show_base_as_merged(view, layer, adapter, weights)
        put_on(module, adapter)
        undo.callback(module.lora_detach)
        for name, values in shown.items():
            merged, _ = module.lora_merged_weight(name)
            if digest(merged.to(values.dtype)) != digest(values):
                return False
    return True


def _show_base_as_merged(
    view: View, layer: str, adapter: LayerAdapter, weights: Mapping[str, nn.Parameter]
) -> None:
    """Give weights the base's values in the dtypes of the merge, and bring the adapter to their device."""
    device = next(iter(weights.values())).device
    for parameter in adapter.parameters.values():
        replace_values(parameter, parameter.data.to(device))
    after_merge = view.record.base.after_merge
    for name, base in after_merge.bases_of(layer, adapter.weights).items():
        dtype = after_merge.seen[join(layer, name)].dtype
        replace_values(weights[name], base.data.to(weights[name].device, dtype))

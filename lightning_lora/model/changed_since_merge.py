"""A merged model: whether its weights are as the merge left them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base.after_merge import WeightAtMerge
from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LayerAdapter, LoRALayer, put_on
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import of_type, only
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join, own_parameter
from lightning_lora.tensors.shards import is_dtensor, true_anywhere
from lightning_lora.tensors.undo import Undo
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
    """Whether the weights of a merged model are as the merge left them, or only moved or converted since.

    True, if the model is not merged. Collective for a sharded one.
    """
    if not view.is_merged:
        return True
    refuse_layers_of_another_model(view)
    has_changed_here = not _is_as_merged_here(view)
    all_parameters = list(view.parameters.values())
    (has_changed_anywhere,) = true_anywhere([has_changed_here], all_parameters)
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
    """Whether all parameters are as the merge left them. This process compares its part of DTensors.

    If the model was converted to another dtype since, no values are the same. Then a
    parameter without update is compared by about a thousand values, converted too: of
    its earlier values, only these are kept. A merged weight is compared exactly: the merge is
    done again from the base and the adapter, and its result converted.
    """
    for name, seen in view.record.base.after_merge.seen_without_update.items():
        parameter = view.parameters.get(name)
        if parameter is None or not seen.may_have_same_values(parameter):
            return False
    return all(
        _is_layer_as_merged(view, layer, adapter)
        for layer, adapter in view.record.merged_layer_adapters.items()
    )


def _is_layer_as_merged(view: View, layer: str, adapter: LayerAdapter) -> bool:
    """Whether the weights of a merged layer are as merged, perhaps converted, and tied to the same ones."""
    values_are_the_same = True
    weights = view.record.base.after_merge.weights_of(layer, adapter.weights)
    for name_in_layer, at_merge in weights.items():
        parameter = view.parameters.get(join(layer, name_in_layer))
        if parameter is None:
            return False  # prune or weight_norm computes the weight now
        if not _is_tie_as_merged(view, parameter, at_merge):
            return False
        values_are_the_same &= at_merge.seen.has_same_values(parameter)
    return values_are_the_same or _is_result_of_second_merge(view, layer, adapter)


def _is_tie_as_merged(
    view: View, parameter: nn.Parameter, at_merge: WeightAtMerge
) -> bool:
    """Whether the other use of a weight that was tied is still there, on the same device in the same dtype.

    True, if the merge left no other use.
    """
    tied = at_merge.tied_parameter
    if tied is None or not at_merge.has_other_use:
        return True
    is_in_model = tied in set(view.parameters.values())
    is_like_it = tied.dtype == parameter.dtype and tied.device == parameter.device
    return is_in_model and is_like_it


def _is_result_of_second_merge(view: View, layer: str, adapter: LayerAdapter) -> bool:
    """Whether a second merge of a layer gives the weights that it has, perhaps converted."""
    module = view.modules[layer]
    weights = {name: own_parameter(module, name) for name in adapter.weights}
    if any(weight.is_meta or is_dtensor(weight) for weight in weights.values()):
        return False
    merged = _merged_again(view, layer, adapter, weights)
    return all(
        digest(merged[name].to(weight.dtype)) == digest(weight.data)
        for name, weight in weights.items()
    )


def _merged_again(
    view: View, layer: str, adapter: LayerAdapter, weights: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The weights of a layer that a second merge gives, by their names in it.

    For this, the layer gets the base's weights and the adapter. Afterwards, the layer,
    its weights and the adapter are as before.
    """
    module: Any = view.modules[layer]
    with torch.inference_mode(False), torch.no_grad(), Undo() as undo:
        for parameter in (*weights.values(), *adapter.parameters.values()):
            undo.callback(replace_values, parameter, parameter.data)
        _give_values_of_merge(view, layer, adapter, weights)
        put_on(module, adapter)
        undo.callback(module.lora_detach)
        merged = dict[str, Tensor]()
        for name in weights:
            merged[name], _ = module.lora_merged_weight(name)
    return merged


def _give_values_of_merge(
    view: View, layer: str, adapter: LayerAdapter, weights: Mapping[str, nn.Parameter]
) -> None:
    """Give weights the base's values in the dtypes of the merge, and bring the adapter to their device."""
    device = next(iter(weights.values())).device
    for parameter in adapter.parameters.values():
        replace_values(parameter, parameter.data.to(device))
    after_merge = view.record.base.after_merge
    for name, at_merge in after_merge.weights_of(layer, adapter.weights).items():
        base = at_merge.base.data.to(weights[name].device, at_merge.seen.dtype)
        replace_values(weights[name], base)

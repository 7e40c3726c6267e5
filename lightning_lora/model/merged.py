"""A merged model: whether its weights are as the merge left them, and what the merge lost."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_lora.errors import AdapterStateError, MergePrecisionWarning, listed, warn
from lightning_lora.layers import LoRALayer, put_on
from lightning_lora.model.record import Merge
from lightning_lora.model.view import View
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join
from lightning_lora.tensors.shards import agreed, is_dtensor, to_local
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


# What a merge lost

_MUCH = 0.25  # a warning is shown if a larger share of an update (in norm) is lost; in bfloat16, 0.1 to 0.2 is common


def warn_of_divergence(view: View) -> None:
    """Warn of adapters that hold NaN or infinite values."""
    broken = [name for name, p in view.adapters.items() if not p.is_meta and not to_local(p).isfinite().all()]
    if broken:
        remedy = "train with a lower learning rate"
        if any(view.adapters[name].dtype == torch.float16 for name in broken):
            remedy = "train without autocast_adapter_dtype=False: these are in float16, in which Adam ends in NaN"
        warn(
            f"{listed(broken)} of {view.title} hold NaN or infinite values, and the merged weights too: the training "
            f"has diverged. Call unmerge_adapters(model) for the base, and {remedy}."
        )


def warn_of_merge(model: nn.Module, lost: Mapping[str, float], untied: Sequence[str]) -> None:
    """Warn of a merge with what :func:`merge` returned: broken ties, values that overflowed, lost updates."""
    title = type(model).__name__
    if untied:
        warn(
            f"The weight of {listed(untied)} in {title} was tied to another layer's: they are two weights now. Load "
            "the state dict into a model where they are not tied (in transformers, config.tie_word_embeddings=False)."
        )
    overflown = [name for name, share in lost.items() if not share < math.inf]
    if overflown:
        warn(
            f"Merging gave values that the dtype of {listed(overflown)} in {title} cannot hold: the weights are "
            "infinite now. Call unmerge_adapters(model), and convert the model to float32 or bfloat16 before merging.",
            MergePrecisionWarning,
        )
    if loss := lost_to_rounding(lost, title):
        warn(
            f"{loss} Keep the adapters on their layers (merge=False, unmerge_adapters), or convert the model to "
            "float32 before merging.",
            MergePrecisionWarning,
        )


def lost_to_rounding(lost: Mapping[str, float], title: str) -> str:
    """Return what a warning says of these shares of updates, by layer: two sentences, or nothing if they are small."""
    much = {name: share for name, share in lost.items() if _MUCH < share < math.inf}
    if not much:
        return ""
    worst = max(much, key=much.__getitem__)
    return (
        f"Merging rounded away {much[worst]:.0%} of the update of {worst!r} in {title}, and more than {_MUCH:.0%} in "
        f"{len(much)} of {len(lost)} layers: half-precision weights cannot hold changes so small."
    )

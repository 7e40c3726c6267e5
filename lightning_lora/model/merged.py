"""A merged model: what the merge lost, and whether its weights are as the merge left them."""

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lightning_lora.errors import AdapterStateError, LoRAWarning, MergePrecisionWarning, listed
from lightning_lora.layers import Adapter, LoRALayer, attach
from lightning_lora.model.state import Record, receive, record_of
from lightning_lora.model.view import View
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join, named_modules, named_parameters, parameters_of
from lightning_lora.tensors.shards import agreed, is_dtensor
from lightning_lora.tensors.values import replace_values


def check_as_merged(model: nn.Module) -> None:
    """Raise an error if a merged model's weights have changed.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its weights have changed since the merge, or its layers have
            the adapters of another model.
    """
    record = record_of(model)
    if is_as_merged(model, record):
        return
    newer = receive(model)  # of a later fit in other processes
    if newer is None or not is_as_merged(model, newer):
        raise AdapterStateError(
            f"The weights of {type(model).__name__} were changed since its adapters were merged into them (replaced, "
            "trained, or converted in a way that cannot be repeated), so that neither its base nor its adapters can be "
            "restored. Load both again, or call remove_adapters(model) to continue from the weights as they are."
        )


def is_as_merged(model: nn.Module, record: Record) -> bool:
    """Whether a merged model still has its merged weights.

    They may have been moved or converted. It is True for a model that is not merged. Collective for a merged model that
    is spread over processes: if one process sees a change, all do.

    Raises:
        AdapterStateError: merged layers have the adapters of another model that shares them.
    """
    if not record.is_merged:
        return True
    parameters = list(named_parameters(model).values())
    return not any(agreed([not _is_as_merged_here(model, record)], parameters))


def _is_as_merged_here(model: nn.Module, record: Record) -> bool:
    """Whether the own parts of this process are as merged."""
    modules = named_modules(model, remove_duplicate=False)
    check_own(model, modules, record)
    parameters = parameters_of(modules)
    for name, seen in record.other_weights.items():
        if name not in parameters or not seen.is_alike(parameters[name]):
            return False
    present = {id(p) for p in parameters.values()}
    for name, adapter in record.merged.items():
        if any(join(name, weight) not in parameters for weight in adapter.bases):  # prune or weight_norm computes it
            return False
        weights = {weight: parameters[join(name, weight)] for weight in adapter.bases}
        if not _are_tied_alike(record, name, adapter, weights, present):
            return False
        if not _are_still(record, name, adapter, weights) and not _are_merged_anew(
            record, modules[name], name, adapter, weights
        ):
            return False
    return True


def check_own(model: nn.Module, modules: Mapping[str, nn.Module], record: Record) -> None:
    """Raise an error if merged layers have other adapters.

    Raises:
        AdapterStateError: another model shares the layers, and its adapters are on them.
    """
    taken = [name for name in record.merged if isinstance(modules.get(name), LoRALayer)]
    if taken:
        raise AdapterStateError(
            f"{listed(taken)} of {type(model).__name__} have the adapters of another model that shares them, and "
            "cannot get their own back. Call remove_adapters on that model first, or give each model layers of its own."
        )


def _are_tied_alike(
    record: Record, name: str, adapter: Adapter, weights: Mapping[str, nn.Parameter], present: set[int]
) -> bool:
    """Whether the other uses of tied weights are still there, on the same device and in the same dtype."""
    for weight, value in weights.items():
        base = adapter.bases[weight]
        alike = id(base) in present and base.dtype == value.dtype and base.device == value.device
        if join(name, weight) in record.tied_weights and not alike:
            return False
    return True


def _are_still(record: Record, name: str, adapter: Adapter, weights: Mapping[str, nn.Parameter]) -> bool:
    """Whether a layer's merged weights, and the base of those that were tied, have not changed."""
    for weight, value in weights.items():
        key = join(name, weight)
        if not record.merged_weights[key].is_still(value):
            return False
        if key in record.tied_weights and not record.tied_weights[key].is_still(adapter.bases[weight]):
            return False
    return True


def _are_merged_anew(
    record: Record, layer: nn.Module, name: str, adapter: Adapter, weights: Mapping[str, nn.Parameter]
) -> bool:
    """Whether a layer's weights are what a merge gives, perhaps converted: merge again, and compare."""
    if any(weight.is_meta or is_dtensor(weight) for weight in weights.values()):
        return False
    shown = {weight: value.data for weight, value in weights.items()}
    with torch.inference_mode(False), torch.no_grad():
        move_adapter(adapter, next(iter(weights.values())).device)
        try:
            for weight, value in weights.items():
                dtype = record.merged_weights[join(name, weight)].dtype
                replace_values(value, adapter.bases[weight].data.to(value.device, dtype))
            attach(layer, adapter)
            try:
                anew = {weight: layer.lora_merged_weight(weight)[0] for weight in weights}  # type: ignore[operator]
            finally:
                layer.lora_detach()  # type: ignore[operator]
        finally:
            for weight, value in weights.items():
                replace_values(value, shown[weight])
    return all(digest(anew[weight].to(value.dtype)) == digest(value) for weight, value in shown.items())


def move_adapter(adapter: Adapter, device: torch.device) -> None:
    """Move an adapter that is not on its layer."""
    for factor in adapter.parameters.values():
        replace_values(factor, factor.data.to(device))


_MUCH = 0.25
"""A warning is shown if a larger share of an update (in norm) is lost. In bfloat16, 0.1 to 0.2 is common."""


def warn_of_divergence(view: View) -> None:
    """Warn of adapters that hold NaN or infinite values.

    Warns:
        LoRAWarning: there are such adapters.
    """
    if broken := view.diverged():
        warnings.warn(
            f"{listed(broken)} of {type(view.model).__name__} hold NaN or infinite values: the training has diverged. "
            "The merged weights hold them too. Call unmerge_adapters(model) for the base, and train again with a lower "
            "learning rate.",
            LoRAWarning,
            stacklevel=4,
        )


def warn_of_merge(model: nn.Module, lost: Mapping[str, float], untied: Sequence[str]) -> None:
    """Warn of problems in a merge.

    Args:
        model: The merged model.
        lost: The share of each layer's update that is lost to rounding.
        untied: The layers whose weights are no longer tied.

    Warns:
        LoRAWarning: a tied weight is no longer tied.
        MergePrecisionWarning: values overflowed, or rounding lost much of an update.
    """
    title = type(model).__name__
    if untied:
        warnings.warn(
            f"The weight of {listed(untied)} in {title} was tied to another layer's. The merge does not change the "
            "other layer, so they are two weights now. Their state dict loads correctly only into a model where they "
            "are not tied (in transformers, config.tie_word_embeddings=False).",
            LoRAWarning,
            stacklevel=3,
        )
    overflown = [name for name, share in lost.items() if not share < math.inf]
    if overflown:
        warnings.warn(
            f"Merging gave values that the dtype of {listed(overflown)} in {title} cannot hold: the weights are "
            "infinite now. Call unmerge_adapters(model), and convert the model to float32 or bfloat16 before merging.",
            MergePrecisionWarning,
            stacklevel=3,
        )
    if loss := lost_to_rounding(lost, title):
        warnings.warn(
            f"{loss} Keep the adapters on their layers (merge=False, unmerge_adapters), or convert the model to "
            "float32 before merging.",
            MergePrecisionWarning,
            stacklevel=3,
        )


def lost_to_rounding(lost: Mapping[str, float], title: str) -> str:
    """Return what a warning says of rounded updates.

    Args:
        lost: The share of each layer's update that is lost to rounding.
        title: What was merged into.

    Returns:
        Two sentences, or nothing if rounding took little.
    """
    much = {name: share for name, share in lost.items() if _MUCH < share < math.inf}
    if not much:
        return ""
    worst = max(much, key=much.__getitem__)
    return (
        f"Merging rounded away {much[worst]:.0%} of the update of {worst!r} in {title}, and more than {_MUCH:.0%} in "
        f"{len(much)} of {len(lost)} layers: half-precision weights cannot hold changes so small. The merged model has "
        "lost this part of the fine-tuning."
    )

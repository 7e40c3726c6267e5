r"""Merge the updates into the weights, and unmerge them exactly.

A merged model is a plain model that remembers its base. Its classes, keys and hooks are the base's, and its weights are
:math:`W + \Delta W`. Its record keeps the adapters and the base's own values.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, LoRAWarning, MergePrecisionWarning, listed
from lightning_lora.functional.update import wide
from lightning_lora.layers import MAGNITUDE, Adapter, LoRALayer, attach
from lightning_lora.model.attach import attach_adapters, check_weights, detach_adapters
from lightning_lora.model.freeze import freeze, unfreeze
from lightning_lora.model.record import Record, find_record
from lightning_lora.model.remember import forget_record, record_of, view_of
from lightning_lora.model.view import View
from lightning_lora.tensors.names import join, named_parameters, own_parameter, set_parameter, submodule
from lightning_lora.tensors.values import digest, replace_values, set_requires_grad


def merge_adapters(model: nn.Module) -> None:
    r"""Merge the updates into the weights of a model.

    ``model`` becomes a plain model with its own classes and keys. ``model.state_dict()`` contains the merged weights,
    and the model runs at the base model's speed. The model also remembers its base: ``unmerge_adapters`` restores the
    adapters and the exact base, and ``remove_adapters`` makes the merge final. A second merge changes nothing.

    The sum :math:`W + \Delta W` is computed in float32 or wider and rounded once. If a weight is tied (for example, an
    embedding and an output head), only the adapted layer's weight changes. The base's own values are kept in CPU
    memory.

    Args:
        model: The model that ``inject_adapters`` was called on.

    Raises:
        AdapterStateError: ``model`` has no adapters, or has weights that no update can be merged into. Nothing is
            merged then.

    Warns:
        MergePrecisionWarning: the weights are in half precision, and rounding lost much of an update, or values
            overflowed.
        LoRAWarning: a tied weight is no longer tied.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, "No Additional Inference
        Latency".

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> merge_adapters(model)
        >>> model[0], list(model.state_dict())
        (Linear(in_features=4, out_features=4, bias=True), ['0.weight', '0.bias'])
    """
    warn_of_merge(model, merge(model))


def unmerge_adapters(model: nn.Module) -> None:
    """Undo a merge: restore the adapters and the exact base.

    Every bit of the base is restored, on the model's current device. If the model was converted to another dtype since
    the merge, the base is converted too.

    Args:
        model: A model that was merged by :func:`merge_adapters`, or by a Trainer with a ``LoRACallback``. An adapted
            model that is not merged does not change.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights have changed.
    """
    check_as_merged(model)
    unmerge(model)


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Unmerge a model inside a ``with`` block.

    At the end it is merged again, if it was merged before.
    """
    was_merged = unmerge(model)
    try:
        yield
    finally:
        if was_merged:
            merge(model)


# Merge


def merge(model: nn.Module) -> dict[str, float]:
    """Merge as :func:`merge_adapters` does, without warnings.

    Returns:
        The share of each layer's update that is lost to rounding.
    """
    view = view_of(model)
    if view.is_merged:
        return {}
    check_weights(view)
    _check_mergeable(view)
    uses = Counter(id(p) for module in {*view.modules.values()} for p in module._parameters.values() if p is not None)
    bases: dict[str, dict[str, Tensor]] = {}
    lost: dict[str, float] = {}
    try:
        for name, layer in view.layers.items():
            tied = [weight for weight in layer.lora_weights() if uses[id(own_parameter(layer, weight))] > 1]
            bases[name], lost[name] = _merge_layer(layer, tied)
    except BaseException:
        for name, values in bases.items():
            _show_base(view.layers[name], values)
        raise
    _weights_have_changed(view)
    unfreeze(View(model))  # tied weights have new parameters
    record = view.record
    record.merged = detach_adapters(view)
    for name, adapter in record.merged.items():
        adapter.bases = bases[name]
    for name, values in bases.items():
        for weight in values:
            merged = own_parameter(submodule(model, name), weight)
            record.merged_digests[join(name, weight)] = digest(merged)
            record.merged_dtypes[join(name, weight)] = merged.dtype
    return lost


def _merge_layer(layer: LoRALayer, tied: list[str]) -> tuple[dict[str, Tensor], float]:
    """Set a layer's weights to ``W + ΔW``.

    Args:
        layer: An adapted layer.
        tied: The names of weights that another layer uses too. They must not change there, so this layer gets new
            parameters for them.

    Returns:
        The base's values by weight, and the largest share of an update that is lost to rounding.
    """
    values, shares = {}, []
    with torch.inference_mode(False), torch.no_grad():
        for name in layer.lora_weights():  # compute all first, so that an error changes nothing
            values[name], share = layer.lora_merged_weight(name)
            shares.append(share)
        bases: dict[str, Tensor] = {}
        for name, merged in values.items():
            weight = own_parameter(layer, name)
            if name in tied:
                bases[name] = weight
                set_parameter(layer, name, nn.Parameter(merged, requires_grad=weight.requires_grad))
            else:
                bases[name] = weight.data.cpu()  # saves GPU memory
                replace_values(weight, merged)
    return bases, max(shares, key=lambda share: (not share < math.inf, share))


def _check_mergeable(view: View) -> None:
    """Raise an error if there are weights that no update can be merged into.

    Raises:
        AdapterStateError: there are such weights.
    """
    empty, spread = [], []
    for name, layer in view.layers.items():
        weights = [own_parameter(layer, weight) for weight in layer.lora_weights()]
        if any(weight.is_meta for weight in weights):
            empty.append(name)
        if any(hasattr(weight, "placements") for weight in weights):
            spread.append(name)
    for names, why in (
        (
            quantised_layers(view),
            "are quantised, and no update can be merged into them. Keep the adapters on their layers; or merge into "
            "the model in full precision: inject_adapters(full, config), load_adapter_state_dict(full, "
            "adapter_state_dict(quantised)), merge_adapters(full).",
        ),
        (empty, "have no values yet (they are on the meta device). Load them first."),
        (spread, "are distributed (DTensor). Save the adapters, and merge them into the whole model."),
    ):
        if names:
            raise AdapterStateError(f"The weights of {listed(names)} in {type(view.model).__name__} {why}")


def quantised_layers(view: View) -> list[str]:
    """Return the names of adapted layers with quantised weights.

    No update can be merged into them.
    """
    return [name for name, layer in view.layers.items() if layer.lora_is_quantised(layer)]


def _weights_have_changed(view: View) -> None:
    torch.clear_autocast_cache()  # it may hold copies of the earlier weights
    for layer in view.layers.values():
        layer.lora_weights_changed()


# Unmerge


def unmerge(model: nn.Module) -> bool:
    """Undo a merge, and return whether there was one.

    If the merged weights were replaced (for example, other weights were loaded), they become a new base. The record is
    dropped then.

    Raises:
        AdapterStateError: layers have adapters of another model that shares them.

    Warns:
        LoRAWarning: the merged weights were replaced.
    """
    record = find_record(model)
    if record is None or not record.is_merged:
        return False
    taken = [name for name in View(model).layers if name in record.merged]
    if taken:
        raise AdapterStateError(
            f"{listed(taken)} of {type(model).__name__} have the adapters of another model that shares them, and "
            "cannot get their own back. Call remove_adapters on that model first, or give each model layers of its own."
        )
    if not is_as_merged(model, record):
        forget_record(model)
        warnings.warn(
            f"The weights of {type(model).__name__} were replaced after its adapters were merged into them: they are "
            "taken as a new base, and the adapters of the earlier fine-tune are dropped.",
            LoRAWarning,
            stacklevel=2,
        )
        return False
    adapters, dtypes = record.merged, record.merged_dtypes
    record.merged, record.merged_digests, record.merged_dtypes = {}, {}, {}
    for name, adapter in adapters.items():
        layer = submodule(model, name)
        _follow_layer(layer, adapter, dtypes[join(name, adapter.parts[0].weight)])
        _show_base(layer, adapter.bases)
        adapter.bases = {}
    attach_adapters(model, adapters)
    view = View(model)
    _weights_have_changed(view)
    freeze(view)
    return True


def _show_base(layer: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """Set a layer's weights to the base's values again, on their current device and in their current dtype."""
    for name, base in bases.items():
        shown = own_parameter(layer, name)
        values = base.data.to(shown)
        if isinstance(base, nn.Parameter):  # it was tied: restore the shared parameter
            replace_values(base, values)
            set_requires_grad(base, shown.requires_grad)
            set_parameter(layer, name, base)
        else:
            replace_values(shown, values)


def _follow_layer(layer: nn.Module, adapter: Adapter, was: torch.dtype) -> None:
    """Move and convert an adapter to its layer's device and dtype: a plain model does not move merged adapters."""
    weight = own_parameter(layer, adapter.parts[0].weight)
    _move(adapter, weight.device)
    if weight.dtype == was:
        return
    for name, factor in adapter.parameters.items():
        is_wide = adapter.settings.autocast_dtype or name == MAGNITUDE
        replace_values(factor, factor.data.to(wide(weight.dtype) if is_wide else weight.dtype))


def _move(adapter: Adapter, device: torch.device) -> None:
    for factor in adapter.parameters.values():
        replace_values(factor, factor.data.to(device))


def check_as_merged(model: nn.Module) -> None:
    """Raise an error if a merged model's weights have changed.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights have changed.
    """
    if not is_as_merged(model, record_of(model)):
        raise AdapterStateError(
            f"The weights of {type(model).__name__} were changed since its adapters were merged into them (replaced, "
            "trained, or converted in a way that cannot be repeated), so that neither its base nor its adapters can be "
            "restored. Load both again, or call remove_adapters(model) to continue from the weights as they are."
        )


def is_as_merged(model: nn.Module, record: Record) -> bool:
    """Whether a merged model still has its merged weights.

    They may have been moved or converted. It is True for a model that is not merged.
    """
    if not record.is_merged:
        return True
    parameters = named_parameters(model, remove_duplicate=False)
    for name, adapter in record.merged.items():
        if any(join(name, weight) not in parameters for weight in adapter.bases):
            return False
        weights = {weight: parameters[join(name, weight)] for weight in adapter.bases}
        same = [digest(value) == record.merged_digests[join(name, weight)] for weight, value in weights.items()]
        dtypes = {weight: record.merged_dtypes[join(name, weight)] for weight in weights}
        if not all(same) and not _is_converted(submodule(model, name), adapter, weights, dtypes):
            return False
    return True


def _is_converted(
    layer: nn.Module, adapter: Adapter, weights: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype]
) -> bool:
    """Whether a layer's weights are its merged weights, converted. To find out, merge and convert again, and compare.

    Args:
        layer: The plain layer.
        adapter: Its adapter.
        weights: Its current weights.
        dtypes: Their dtypes at the merge.
    """
    if all(weight.dtype == dtypes[name] for name, weight in weights.items()):
        return False
    shown = {name: weight.data for name, weight in weights.items()}
    _move(adapter, next(iter(weights.values())).device)
    with torch.no_grad():
        try:
            for name, weight in weights.items():
                replace_values(weight, adapter.bases[name].data.to(weight.device, dtypes[name]))
            attach(layer, adapter)
            try:
                anew = {name: layer.lora_merged_weight(name)[0] for name in weights}  # type: ignore[operator]
            finally:
                layer.lora_detach()  # type: ignore[operator]
        finally:
            for name, weight in weights.items():
                replace_values(weight, shown[name])
    return all(digest(anew[name].to(value.dtype)) == digest(value) for name, value in shown.items())


# Warnings

_MUCH = 0.25
"""A warning is shown if a larger share of an update (in norm) is lost. In bfloat16, 0.1 to 0.2 is common."""


def warn_of_merge(model: nn.Module, lost: Mapping[str, float]) -> None:
    """Warn of problems in a merge.

    Args:
        model: The merged model.
        lost: The result of :func:`merge`.

    Warns:
        LoRAWarning: a tied weight is no longer tied.
        MergePrecisionWarning: values overflowed, or rounding lost much of an update.
    """
    untied = [weight.layer for weight in View(model).merged if isinstance(weight.base, nn.Parameter)] if lost else []
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
    much = {name: share for name, share in lost.items() if _MUCH < share < math.inf}
    if much:
        worst = max(much, key=much.__getitem__)
        warnings.warn(
            f"Merging rounded away {much[worst]:.0%} of the update of {worst!r} in {title}, and more than {_MUCH:.0%} "
            f"in {len(much)} of {len(lost)} layers: half-precision weights cannot hold changes so small. The merged "
            "model has lost this part of the fine-tuning. Keep the adapters on their layers "
            "(merge=False, unmerge_adapters), or convert the model to float32 before merging.",
            MergePrecisionWarning,
            stacklevel=3,
        )

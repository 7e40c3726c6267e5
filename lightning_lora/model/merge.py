"""Merge the updates into the weights.

The record keeps the adapters and the base's values, for ``unmerge.py``.
"""

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_lora.base.after_merge import AfterMerge, WeightAtMerge
from lightning_lora.layers import LoRALayer
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.changes.attach import (
    detach_adapters,
    update_for_changed_layers,
    update_for_changed_weights,
)
from lightning_lora.model.changes.freeze import freeze, unfreeze
from lightning_lora.model.mergeable import layers_with, refuse_unmergeable, tied_weights
from lightning_lora.model.own_loop.early_optimizers import note_detached_adapter
from lightning_lora.model.records import forget_record
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guard, Guards
from lightning_lora.tensors.names import join, names_not_in, own_parameter, set_tensor
from lightning_lora.tensors.seen import Seen
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.undo import Undo
from lightning_lora.tensors.values import put_back, replace_values, set_aside


def merge_adapters(model: nn.Module, *, keep_base: bool = True) -> None:
    """Merge the updates into the weights of a model.

    ``model`` becomes a plain model with its own classes and keys.
    ``model.state_dict()`` contains the merged weights, and the model runs at the base
    model's speed. The model also remembers its base: ``unmerge_adapters`` restores the
    adapters and the exact base, and ``remove_adapters`` makes the merge final. A second
    merge changes nothing.

    The sum ``W + ΔW`` is computed in float32 or wider and rounded once. If a weight is
    tied (for example, an embedding and an output head), only the adapted layer's weight
    changes. The base's own values are kept in CPU memory.

    Args:
        model: The model that ``inject_adapters`` was called on.
        keep_base: Remember the adapters and the base. If False, the merge is final and
            takes no memory beyond that of the largest layer. An error midway leaves
            every layer either adapted or merged, so the model still computes the same.

    Raises:
        AdapterStateError: ``model`` has no adapters, or has weights that no update can
            be merged into. Nothing is merged then.

    Warns:
        MergePrecisionWarning: the weights are in half precision, and rounding lost much
            of an update, or values overflowed.
        LoRAWarning: a tied weight is no longer tied.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section
        4.1, "No Additional Inference Latency".

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> merge_adapters(model)
        >>> model[0], list(model.state_dict())
        (Linear(in_features=4, out_features=4, bias=True), ['0.weight', '0.bias'])
    """
    report = merge(model) if keep_base else _merge_for_good(model)
    Guards().tell(Guard.merged, type(model).__name__, report.lost, report.untied)


@dataclass
class MergeReport:
    """What a merge has done, for guards to say."""

    lost: dict[str, float] = field(default_factory=dict)
    """The largest share of an update that rounding lost, by layer."""

    untied: list[str] = field(default_factory=list)
    """The layers whose weight was tied to another one's."""


def merge(model: nn.Module) -> MergeReport:
    """Merge as :func:`merge_adapters` does, and let the caller say what was lost.

    After an error, the weights have their values again, and the base is frozen again.
    Only the last step, which takes the adapters off, is not undone.
    """
    view = view_of(model, "merge_adapters")
    if view.is_merged:
        return MergeReport()
    _begin_merge(view)
    tied = tied_weights(view)
    report = MergeReport(untied=layers_with(view, tied.keys()))
    bases = dict[str, Tensor]()
    with torch.inference_mode(False), torch.no_grad(), Undo() as undo:
        # an Undo runs its last step first: so _freeze_again, which is added first, runs
        # when all weights are back
        undo.callback(_freeze_again, view)
        for name, layer in view.layers.items():
            merged, report.lost[name] = _merged_weights(layer)
            bases |= _put_on_layer(view, name, merged, tied, undo)
        update_for_changed_weights(view)
        view.look_again()  # layers with a tied weight have new parameters
        unfreeze(view)
        after_merge = AfterMerge(
            seen_without_update=_look_at_others(view, merged=bases),
            weights=_look_at_merged(view, bases, tied),
        )
        adapters = detach_adapters(view)
        undo.keep()
    view.record.note_merged(adapters, after_merge)
    return report


def _freeze_again(view: View) -> None:
    """Freeze the base after a merge that failed, and whose weights are back."""
    view.look_again()
    freeze(view)


def _merge_for_good(model: nn.Module) -> MergeReport:
    """Merge layer by layer, keeping nothing, and forget the adapters.

    An error leaves each layer either adapted or merged.
    """
    view = view_of(model, "merge_adapters")
    if view.is_merged:
        forget_record(view.model)
        return MergeReport()
    _begin_merge(view)
    tied = tied_weights(view)
    report = MergeReport(untied=layers_with(view, tied.keys()))
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in view.layers.items():
            merged, report.lost[name] = _merged_weights(layer)
            _put_for_good(view, name, merged, tied)
            _take_off_for_good(view, name, layer)
    torch.clear_autocast_cache()
    view.look_again()  # layers with a tied weight have new parameters
    unfreeze(view)
    update_for_changed_layers(view)
    forget_record(view.model)
    return report


def _begin_merge(view: View) -> None:
    """Refuse what cannot be merged, and let guards speak."""
    refuse_computed_weights(view)
    refuse_unmergeable(view)
    Guards().tell(Guard.merge_begins, view)


# The weights of one layer


def _merged_weights(layer: LoRALayer) -> tuple[dict[str, Tensor], float]:
    """A layer's merged weights, by name in the layer, and the largest share of an update that rounding lost.

    All are computed before one is set: so an error here leaves the layer as it is.
    """
    merged = dict[str, Tensor]()
    shares = []
    for weight in layer.lora_weights():
        merged[weight], share = layer.lora_merged_weight(weight)
        shares.append(share)
    return merged, max(shares, key=_overflow_first)


def _overflow_first(share: float) -> tuple[bool, float]:
    """The key by which shares are compared.

    The largest is an infinite one, or NaN: it comes from values that a dtype cannot
    hold.
    """
    is_overflow = math.isinf(share) or math.isnan(share)
    return is_overflow, share


def _put_on_layer(
    view: View,
    layer_name: str,
    merged: Mapping[str, Tensor],
    tied: Container[str],
    undo: Undo,
) -> dict[str, Tensor]:
    """Give a layer its merged weights. Return those of the base, by their names in the model."""
    bases = dict[str, Tensor]()
    for weight, values in merged.items():
        name = join(layer_name, weight)
        if name in tied:
            layer = view.layers[layer_name]
            bases[name] = _put_beside_tied(layer, weight, values, undo)
        else:
            bases[name] = _put_in_place(view, name, values, undo)
    return bases


def _put_in_place(view: View, name: str, merged: Tensor, undo: Undo) -> Tensor:
    """Give a weight its values with the update. Return those of the base."""
    parameter = view.parameters[name]
    base = set_aside(parameter)  # in CPU memory
    undo.callback(put_back, parameter, base, parameter.device)
    view.record.base.readings.note_copied(name, parameter, base)
    replace_values(parameter, merged)
    return base


def _put_beside_tied(
    layer: LoRALayer, weight: str, merged: Tensor, undo: Undo
) -> nn.Parameter:
    """Give a layer a new parameter with the update.

    Return the tied parameter, which the other layers keep.
    """
    base = own_parameter(layer, weight)
    undo.callback(set_tensor, layer, weight, base)
    _set_new_parameter(layer, weight, merged)
    return base


def _put_for_good(
    view: View, layer_name: str, merged: Mapping[str, Tensor], tied: Container[str]
) -> None:
    """Give a layer its merged weights, and keep nothing of the base."""
    layer = view.layers[layer_name]
    for weight, values in merged.items():
        if join(layer_name, weight) in tied:
            _set_new_parameter(layer, weight, values)
        else:
            replace_values(own_parameter(layer, weight), values)


def _set_new_parameter(layer: LoRALayer, weight: str, values: Tensor) -> None:
    """Give a layer a parameter of its own in place of a tied one."""
    requires_grad = own_parameter(layer, weight).requires_grad
    set_tensor(layer, weight, nn.Parameter(values, requires_grad))


def _take_off_for_good(view: View, name: str, layer: LoRALayer) -> None:
    """Take the adapter off a layer that was merged."""
    layer.lora_weights_changed()
    note_detached_adapter(view, name, layer.lora_detach())
    # if a later layer fails, no call may miss this layer's adapter
    view.adapter.layers = tuple(names_not_in(view.adapter.layers, [name]))


# What the record keeps


def _look_at_merged(
    view: View, bases: Mapping[str, Tensor], tied: Mapping[str, nn.Parameter]
) -> dict[str, WeightAtMerge]:
    """Look at the weights with an update.

    ``bases`` are the base's values of these. ``tied`` are those that were tied, each
    with the parameter of its other uses.
    """
    in_model = set(view.parameters.values())
    weights = dict[str, WeightAtMerge]()
    for name, base in bases.items():
        weights[name] = WeightAtMerge(
            # its digest is computed later, and only if it is asked for
            Seen(view.parameters[name]),
            base,
            tied_parameter=tied.get(name),
            has_other_use=tied.get(name) in in_model,
        )
    return weights


def _look_at_others(view: View, merged: Iterable[str]) -> dict[str, Seen]:
    """Look at all parameters but the merged weights."""
    # a weight of a shared layer has several names, and ``merged`` the first: so it is
    # recognised as an object
    merged_parameters = {view.parameters[name] for name in merged}
    seen = dict[str, Seen]()
    for name, parameter in view.base_parameters.items():
        if parameter not in merged_parameters:
            seen[name] = Seen(parameter, _known_digest(view, name, parameter))
    return seen


def _known_digest(view: View, name: str, parameter: nn.Parameter) -> int | None:
    """The digest of a parameter of the base, which is read again only if it has changed.

    None: the parameter is a DTensor, or has no values.
    """
    if parameter.is_meta or is_dtensor(parameter):
        return None
    return view.record.base.readings.digests_now({name: parameter})[name]

"""Merge the updates into the weights, and unmerge them exactly: the record keeps the adapters and the base's values."""

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_lora.base.base_tensors import AfterMerge
from lightning_lora.errors import AdapterStateError, listed, warn
from lightning_lora.layers import LayerAdapter, LoRALayer, LoRATokens
from lightning_lora.model.changed_since_adapted import refuse_computed_weights, refuse_resized_or_tied
from lightning_lora.model.changed_since_merge import is_as_merged, refuse_changed_since_merge
from lightning_lora.model.changes.attach import (
    attach_adapters,
    detach_adapters,
    reinitialise_if_base_changed,
    update_for_changed_layers,
    update_for_changed_weights,
)
from lightning_lora.model.changes.freeze import freeze, unfreeze
from lightning_lora.model.changes.off_layers import convert_to_layer, move_to_layer
from lightning_lora.model.changes.undone import undone_on_error
from lightning_lora.model.record import forget_record, record_of, start_call, state_of
from lightning_lora.model.view import View, view_of
from lightning_lora.model.views.tensors_view import was_tied
from lightning_lora.moments import Guards
from lightning_lora.tensors.dicts import with_values
from lightning_lora.tensors.names import (
    direct_parameters,
    first_names,
    join,
    names_not_in,
    own_parameter,
    set_parameter,
)
from lightning_lora.tensors.seen import Seen
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.undo import Undo
from lightning_lora.tensors.values import replace_values, set_aside, set_requires_grad


def merge_adapters(model: nn.Module, *, keep_base: bool = True) -> None:
    """Merge the updates into the weights of a model.

    ``model`` becomes a plain model with its own classes and keys. ``model.state_dict()`` contains the merged weights,
    and the model runs at the base model's speed. The model also remembers its base: ``unmerge_adapters`` restores the
    adapters and the exact base, and ``remove_adapters`` makes the merge final. A second merge changes nothing.

    The sum ``W + ΔW`` is computed in float32 or wider and rounded once. If a weight is tied (for example, an
    embedding and an output head), only the adapted layer's weight changes. The base's own values are kept in CPU
    memory.

    Args:
        model: The model that ``inject_adapters`` was called on.
        keep_base: Remember the adapters and the base. If False, the merge is final and takes no memory beyond that of
            the largest layer. An error midway leaves every layer either adapted or merged, so the model still computes
            the same.

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
    done = merge(model) if keep_base else _merge_for_good(model)
    Guards().merged(type(model).__name__, done.lost, done.untied)


def unmerge_adapters(model: nn.Module) -> None:
    """Undo a merge: restore the adapters and the exact base.

    Every bit of the base is restored, on the model's current device. If the model was converted to another dtype since
    the merge, the base is converted too.

    Args:
        model: A model that was merged by ``merge_adapters``, or by a Trainer with a ``LoRACallback``. An adapted
            model that is not merged does not change.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights have changed.
    """
    start_call(model, "unmerge_adapters")
    _unmerge(View(model))


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Unmerge a model inside a ``with`` block. At the end it is merged again, if it was merged before."""
    was_merged = record_of(model).is_merged
    _unmerge(View(model))
    try:
        yield
    finally:
        if was_merged:
            merge(model)


# Merge


@dataclass
class MergeReport:
    """What a merge has done."""

    lost: dict[str, float] = field(default_factory=dict)  # the largest share of an update that rounding lost, by layer
    untied: list[str] = field(default_factory=list)  # the layers whose weight was tied to another one's


def merge(model: nn.Module) -> MergeReport:
    """Merge as :func:`merge_adapters` does, and let the caller say what was lost."""
    view = view_of(model, "merge_adapters")
    if view.is_merged:
        return MergeReport()
    _begin_merge(view)
    tied = tied_weights(view)
    done = MergeReport(untied=list(tied))
    bases: dict[str, Tensor] = {}
    with Undo() as undo:  # after an error: all weights get back what they had, and then the base is frozen again
        undo.callback(freeze, view)
        undo.callback(view.look_again)
        for name, layer in view.layers.items():
            merged, done.lost[name] = _merged_weights(layer)
            for weight, values in merged.items():
                is_tied = weight in tied.get(name, ())
                bases[join(name, weight)] = _keep_base_of(view, name, weight, undo, is_tied=is_tied)
                _set_weight(layer, weight, values, is_tied=is_tied)
        update_for_changed_weights(view)
        view.look_again()  # tied weights have new parameters
        unfreeze(view)
        after_merge = _look_at_parameters(view, bases)
        adapters = detach_adapters(view)
        undo.keep()
    view.record.note_merged(adapters, after_merge)
    return done


def _merge_for_good(model: nn.Module) -> MergeReport:
    """Merge layer by layer, keeping nothing, and forget the adapters."""
    view = view_of(model, "merge_adapters")
    if view.is_merged:
        forget_record(view.model)
        return MergeReport()
    _begin_merge(view)
    tied = tied_weights(view)
    done = MergeReport(untied=list(tied))
    for name, layer in view.layers.items():
        merged, done.lost[name] = _merged_weights(layer)
        for weight, values in merged.items():
            _set_weight(layer, weight, values, is_tied=weight in tied.get(name, ()))
        layer.lora_weights_changed()
        layer.lora_detach()
        view.adapter.layers = tuple(names_not_in(view.adapter.layers, [name]))
    torch.clear_autocast_cache()
    view.look_again()
    unfreeze(view)
    update_for_changed_layers(view)
    forget_record(view.model)
    return done


def _begin_merge(view: View) -> None:
    """Refuse what cannot be merged, and let guards speak."""
    refuse_computed_weights(view)
    refuse_unmergeable(view)
    Guards().merge_begins(view)


def tied_weights(view: View) -> dict[str, list[str]]:
    """Return the weights that another layer uses too, by layer. Layers without such are left out."""
    uses = Counter(direct_parameters(first_names(view.modules)).values())
    tied = {}
    for name, layer in view.layers.items():
        shared = [weight for weight in layer.lora_weights() if uses[own_parameter(layer, weight)] > 1]
        all_uses_are_updated = isinstance(layer, LoRATokens)  # the other use reads the same rows
        if shared and not all_uses_are_updated:
            tied[name] = shared
    return tied


def _merged_weights(layer: LoRALayer) -> tuple[dict[str, Tensor], float]:
    """A layer's merged weights, all before one is set, and the largest share of an update that rounding lost."""
    merged = dict[str, Tensor]()
    shares = []
    with torch.inference_mode(False), torch.no_grad():
        for weight in layer.lora_weights():
            merged[weight], share = layer.lora_merged_weight(weight)
            shares.append(share)
    return merged, max(shares, key=_overflow_first)


@torch.inference_mode(False)
@torch.no_grad()
def _keep_base_of(view: View, layer: str, weight: str, undo: Undo, *, is_tied: bool) -> Tensor:
    """Return the base's values of a weight, before it is merged: of a tied one, the parameter itself."""
    parameter = own_parameter(view.layers[layer], weight)
    if is_tied:
        undo.callback(set_parameter, view.layers[layer], weight, parameter)
        return parameter
    base = set_aside(parameter)  # saves GPU memory
    undo.callback(_put_back, parameter, base, parameter.device)
    view.record.base.readings.note_copied(join(layer, weight), parameter, base)
    return base


@torch.inference_mode(False)
@torch.no_grad()
def _set_weight(layer: LoRALayer, weight: str, merged: Tensor, *, is_tied: bool) -> None:
    """Set a layer's weight to ``W + ΔW``. In place of a tied one, it gets a parameter of its own."""
    parameter = own_parameter(layer, weight)
    if is_tied:
        set_parameter(layer, weight, nn.Parameter(merged, parameter.requires_grad))
    else:
        replace_values(parameter, merged)


def _overflow_first(share: float) -> tuple[bool, float]:
    """By which shares are compared: one that is infinite or NaN, by values that a dtype cannot hold, is the largest."""
    is_overflow = math.isinf(share) or math.isnan(share)
    return is_overflow, share


def _put_back(tensor: Tensor, values: Tensor, device: torch.device) -> None:
    replace_values(tensor, values)  # frees what the tensor holds on the device, before the copy there
    replace_values(tensor, values.to(device))


def _look_at_parameters(view: View, bases: dict[str, Tensor]) -> AfterMerge:
    """Look at all parameters after a merge. ``bases`` are the base's values of the merged ones."""
    seen = dict[str, Seen]()
    merged = {view.parameters[name] for name in bases}
    for name, parameter in view.base_parameters.items():
        if parameter not in merged:  # a shared layer has several names
            seen[name] = Seen(parameter, _known_digest(view, name, parameter))
    for name in bases:
        seen[name] = Seen(view.parameters[name])  # its digest is computed only if it is asked for
    were_tied = with_values(bases, set(view.parameters.values()))  # another layer still has them
    seen_tied = {name: Seen(parameter) for name, parameter in were_tied.items()}
    return AfterMerge(seen, bases, seen_tied)


def _known_digest(view: View, name: str, parameter: nn.Parameter) -> int | None:
    """The digest of a parameter of the base, read again only if it has changed. None: of spread or absent values."""
    if parameter.is_meta or is_dtensor(parameter):
        return None
    return view.record.base.readings.digests_now({name: parameter})[name]


def refuse_unmergeable(view: View) -> None:
    """Refuse weights that no update can be merged into."""
    refuse_resized_or_tied(view)
    _refuse_layers(
        view,
        quantised_layers(view),
        "are quantised: no update can be merged into them. Keep the adapters; or inject_adapters(full, config), "
        "load_adapter_state_dict(full, adapter_state_dict(quantised)), merge_adapters(full) in full precision.",
    )
    _refuse_layers(
        view,
        _layers_with_weights(view, view.layers, _is_without_values),
        "have no values yet (they are on the meta device). Load them first.",
    )
    _refuse_layers(
        view,
        _layers_with_weights(view, tied_weights(view), is_dtensor),
        "are tied to other layers, and FSDP2 keeps them one weight. Leave them out with exclude_modules; or save "
        "the adapters, and merge them into the model on one device.",
    )


def _is_without_values(weight: Tensor) -> bool:
    return weight.is_meta


def _layers_with_weights(view: View, layers: Iterable[str], holds: Callable[[Tensor], bool]) -> list[str]:
    """Those of these layers that have a weight of which a condition holds."""
    return [name for name in layers if any(holds(weight) for weight in view.base_weights_of(name))]


def _refuse_layers(view: View, layers: Collection[str], why: str) -> None:
    if layers:
        raise AdapterStateError(f"The weights of {listed(layers)} in {view.title} {why}")


def quantised_layers(view: View) -> list[str]:
    """Return the names of adapted layers with quantised weights."""
    return [name for name, layer in view.layers.items() if layer.lora_is_quantised(layer)]


# Unmerge


def unmerge_or_forget(model: nn.Module) -> bool:
    """Undo a merge, and return whether there was one. Weights that were replaced since are a new base: that warns."""
    if not state_of(model).is_merged:
        return False
    start_call(model, "unmerge_adapters")
    view = View(model)
    if not is_as_merged(view):
        forget_record(model)
        warn(
            f"The weights of {view.title} were replaced after its adapters were merged into them: they are taken as a "
            "new base, and the adapters of the earlier fine-tune are dropped."
        )
        return False
    _unmerge(view)
    return True


def _unmerge(view: View) -> None:
    """Undo a merge, if there was one."""
    if not view.is_merged:
        return
    refuse_changed_since_merge(view)
    record = view.record
    adapters = record.merged_layer_adapters
    with undone_on_error(view), torch.inference_mode(False), torch.no_grad(), Undo() as undo:
        for layer, adapter in adapters.items():
            _move_to_layer(view, layer, adapter, undo)
            for weight, base in record.base.after_merge.bases_of(layer, adapter.weights).items():
                _write_base(view, layer, weight, base, undo)
        record.note_unmerged(view.parameters)
        attach_adapters(view, adapters)
        update_for_changed_weights(view)
        freeze(view)
        reinitialise_if_base_changed(view)  # it may have been converted
        undo.keep()


def _move_to_layer(view: View, layer: str, adapter: LayerAdapter, undo: Undo) -> None:
    """Give a merged adapter the device of its layer, and its dtype if that was converted since the merge."""
    name = join(layer, adapter.weights[0])
    is_converted = view.parameters[name].dtype != view.record.base.after_merge.seen[name].dtype
    if is_converted:
        convert_to_layer(view.modules[layer], adapter, undo)
    else:
        move_to_layer(view.modules[layer], adapter, undo)


def _write_base(view: View, layer: str, weight: str, base: Tensor, undo: Undo) -> None:
    """Set a layer's weight to the base's values again. It keeps its current device and dtype."""
    module = view.modules[layer]
    shown = own_parameter(module, weight)
    undo.callback(_put_back, shown, set_aside(shown), shown.device)
    if was_tied(base):  # restore the shared parameter
        undo.callback(set_parameter, module, weight, shown)
        undo.callback(replace_values, base, base.data)
        replace_values(base, base.data.to(shown))  # if all its layers are merged, none held it: it was not moved
        set_requires_grad(base, shown.requires_grad)
        set_parameter(module, weight, base)
    else:
        replace_values(shown, base.to(shown))
        view.record.base.readings.note_copied(join(layer, weight), base, shown)

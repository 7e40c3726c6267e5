"""Merge the updates into the weights, and unmerge them exactly: the record keeps the adapters and the base's values."""

import math
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.errors import AdapterStateError, listed, warn
from lightning_lora.layers import Adapter, LoRATokens
from lightning_lora.model import attach
from lightning_lora.model.blocks import refuse_in_block
from lightning_lora.model.merged import check_as_merged, is_as_merged
from lightning_lora.model.record import Merge, Record, find_record, forget_record, record_of
from lightning_lora.model.view import View, view_of
from lightning_lora.moments import Guards
from lightning_lora.tensors.names import join, own_parameter, set_parameter
from lightning_lora.tensors.shards import is_dtensor
from lightning_lora.tensors.values import Seen, replace_values, set_aside, set_requires_grad


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
    lost, untied = merge(model) if keep_base else _merge_for_good(view_of(model))
    Guards().merged(type(model).__name__, lost, untied)


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
    record_of(model)
    _restore(View(model))


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Unmerge a model inside a ``with`` block. At the end it is merged again, if it was merged before."""
    was_merged = record_of(model).is_merged
    _restore(View(model))
    try:
        yield
    finally:
        if was_merged:
            merge(model)


# Merge


def merge(model: nn.Module) -> tuple[dict[str, float], list[str]]:
    """Merge as :func:`merge_adapters`. Return what rounding took of each layer's update, and the untied layers."""
    view = view_of(model)
    if view.is_merged:
        return {}, []
    tied = _check(view)
    lost, bases = dict[str, float](), dict[str, dict[str, Tensor]]()
    with ExitStack() as undo:
        undo.callback(attach.freeze, view)
        undo.callback(view.look_again)
        for name in view.layers:
            lost[name], bases[name] = _merge_layer(view, name, tied.get(name, ()), undo)
        attach.weights_have_changed(view)
        view.look_again()  # tied weights have new parameters
        attach.unfreeze(view)
        seen = _see(view, bases)
        adapters = attach.detach_adapters(view)
        undo.pop_all()
    for name, adapter in adapters.items():
        adapter.bases = bases[name]
    view.record.merge = Merge(adapters, *seen)
    return lost, list(tied)


def _merge_for_good(view: View) -> tuple[dict[str, float], list[str]]:
    """Merge layer by layer, keeping nothing, and forget the adapters."""
    lost, tied = dict[str, float](), dict[str, list[str]]()
    if not view.is_merged:
        tied = _check(view)
        for name, layer in view.layers.items():
            lost[name], _ = _merge_layer(view, name, tied.get(name, ()))
            layer.lora_weights_changed()
            layer.lora_detach()
            view.adapter.layers = tuple(filter(name.__ne__, view.adapter.layers))
        torch.clear_autocast_cache()
        view.look_again()
        attach.unfreeze(view)
        attach.detach_adapters(view)  # there are none any more: inference paths are switched on again
    forget_record(view.model)
    return lost, list(tied)


def _check(view: View) -> dict[str, list[str]]:
    """Refuse what cannot be merged. Return :func:`tied_weights`."""
    refuse_in_block(view.model, "merge_adapters")
    attach.check_weights(view)
    tied = check_mergeable(view)
    Guards().merge_begins(view)
    return tied


def tied_weights(view: View) -> dict[str, list[str]]:
    """Return the weights that another layer uses too, by layer. Layers without such are left out."""
    uses = Counter(id(p) for module in {*view.modules.values()} for p in module._parameters.values() if p is not None)
    tied = {}
    for name, layer in view.layers.items():
        weights = () if isinstance(layer, LoRATokens) else layer.lora_weights()  # all uses of its weight get its rows
        if shared := [weight for weight in weights if uses[id(own_parameter(layer, weight))] > 1]:
            tied[name] = shared
    return tied


def _merge_layer(
    view: View, name: str, tied: Collection[str], undo: ExitStack | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Set a layer's weights to ``W + ΔW``. For weights in ``tied`` it gets new parameters.

    Return the largest share of an update that is lost to rounding, and the base's values: with ``undo``, they are kept.
    """
    layer, values, shares, bases = view.layers[name], {}, [], dict[str, Tensor]()
    with torch.inference_mode(False), torch.no_grad():
        for weight in layer.lora_weights():  # compute all first, so that an error changes nothing
            values[weight], share = layer.lora_merged_weight(weight)
            shares.append(share)
        for weight, merged in values.items():
            own = own_parameter(layer, weight)
            base: Tensor = own
            if weight in tied:
                if undo is not None:
                    undo.callback(set_parameter, layer, weight, own)
                set_parameter(layer, weight, nn.Parameter(merged, own.requires_grad))
            else:
                if undo is not None:
                    base = set_aside(own)  # saves GPU memory
                    undo.callback(_put_back, own, base, own.device)
                    view.record.base_was_copied(join(name, weight), own, base)
                replace_values(own, merged)
            bases[weight] = base
    return max(shares, key=lambda share: (not share < math.inf, share)), bases


def _put_back(tensor: Tensor, values: Tensor, device: torch.device) -> None:
    replace_values(tensor, values)  # the other values make room first
    replace_values(tensor, values.to(device))


def _see(view: View, bases: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Seen], dict[str, Seen], dict[str, Seen]]:
    """Look at all weights after a merge, as a :class:`Merge` holds them."""
    names = [(join(layer, weight), base) for layer, values in bases.items() for weight, base in values.items()]
    known = {id(view.parameters[name]) for name, _ in names} | set(map(id, view.adapters.values()))
    others = {}
    for name, p in view.parameters.items():
        if id(p) not in known:  # a shared layer has several names
            others[name] = Seen(p, None if p.is_meta or is_dtensor(p) else view.record.digests({name: p})[name])
    present = set(map(id, view.parameters.values()))
    merged, tied = {}, {}
    for name, base in names:
        merged[name] = Seen(view.parameters[name])  # its digest is computed only if it is asked for
        if id(base) in present:
            tied[name] = Seen(base)
    return merged, tied, others


def check_mergeable(view: View) -> dict[str, list[str]]:
    """Refuse weights that no update can be merged into. Return :func:`tied_weights`."""
    attach.check_as_adapted(view)
    used = {name: [own_parameter(layer, w) for w in layer.lora_weights()] for name, layer in view.layers.items()}
    empty = [name for name, weights in used.items() if any(weight.is_meta for weight in weights)]
    tied = tied_weights(view)
    spread = [name for name in tied if any(map(is_dtensor, used[name]))]
    for names, why in (
        (
            quantised_layers(view),
            "are quantised: no update can be merged into them. Keep the adapters; or inject_adapters(full, config), "
            "load_adapter_state_dict(full, adapter_state_dict(quantised)), merge_adapters(full) in full precision.",
        ),
        (empty, "have no values yet (they are on the meta device). Load them first."),
        (
            spread,
            "are tied to other layers, and FSDP2 keeps them one weight. Leave them out with exclude_modules; or save "
            "the adapters, and merge them into the model on one device.",
        ),
    ):
        if names:
            raise AdapterStateError(f"The weights of {listed(names)} in {view.title} {why}")
    return tied


def quantised_layers(view: View) -> list[str]:
    """Return the names of adapted layers with quantised weights."""
    return [name for name, layer in view.layers.items() if layer.lora_is_quantised(layer)]


# Unmerge


def unmerge_or_forget(model: nn.Module) -> bool:
    """Undo a merge, and return whether there was one. Weights that were replaced since are a new base: that warns."""
    record = find_record(model)
    if record is None or record.merge is None:
        return False
    record_of(model)  # refuses a model whose adapters are disabled
    view = View(model)
    if not is_as_merged(view):
        forget_record(model)
        warn(
            f"The weights of {view.title} were replaced after its adapters were merged into them: they are taken as a "
            "new base, and the adapters of the earlier fine-tune are dropped."
        )
        return False
    _restore(view)
    return True


def _restore(view: View) -> None:
    """Undo a merge, if there was one."""
    check_as_merged(view)
    record = view.record
    if record.merge is None:
        return
    adapters, weights = record.merged, record.merge.weights
    with attach.undone_on_error(view), torch.inference_mode(False), torch.no_grad(), ExitStack() as undo:
        for name, adapter in adapters.items():
            layer = view.modules[name]
            attach.move_to_layer(layer, adapter, weights[join(name, adapter.matrices[0].weight)].dtype, undo)
            _show_base(record, name, layer, adapter, undo)
        record.was_unmerged(view.parameters)
        attach.attach_adapters(view, adapters)
        attach.weights_have_changed(view)
        attach.freeze(view)
        view.begin_anew()  # it may have been converted
        undo.pop_all()
    for adapter in adapters.values():
        adapter.bases = {}


def _show_base(record: Record, name: str, layer: nn.Module, adapter: Adapter, undo: ExitStack) -> None:
    """Set a layer's weights to the base's values again. They keep their current device and dtype."""
    for weight, base in adapter.bases.items():
        shown = own_parameter(layer, weight)
        undo.callback(_put_back, shown, set_aside(shown), shown.device)
        if isinstance(base, nn.Parameter):  # it was tied: restore the shared parameter
            undo.callback(set_parameter, layer, weight, shown)
            undo.callback(replace_values, base, base.data)
            replace_values(base, base.data.to(shown))  # where all its uses are adapted, it was in no model meanwhile
            set_requires_grad(base, shown.requires_grad)
            set_parameter(layer, weight, base)
        else:
            replace_values(shown, base.to(shown))
            record.base_was_copied(join(name, weight), base, shown)

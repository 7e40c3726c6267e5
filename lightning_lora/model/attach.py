"""Adapters on their layers and off them; updates in the weights and out of them.

A folded model is a plain one that remembers: its classes and keys are the base's, its weights have the updates merged,
and the adapters and the base's own values lie in its record.
"""

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from lightning_lora.errors import AdapterStateError, LoRAWarning, MergePrecisionWarning, listed
from lightning_lora.layers import Adapter, LoRALayer, adapter_for, attach, repacks, unpack
from lightning_lora.model.handover import shows
from lightning_lora.model.record import (
    Record,
    adapted_layers,
    find_record,
    forget_record,
    freeze,
    merged_weights,
    record_of,
    unfreeze,
)
from lightning_lora.tensors.inplace import is_overlaid
from lightning_lora.tensors.names import named_modules, named_parameters, own_parameter, submodule
from lightning_lora.tensors.values import digest


def attach_adapters(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Put adapters on the layers of ``model`` that they are named after."""
    modules = named_modules(model, remove_duplicate=False)
    for name, adapter in adapters.items():
        attach(modules[name], adapter)
    for module, switch, off, around in _inference_paths(model):
        if any(isinstance(inner, LoRALayer) for inner in around.modules()):
            unpack(module)
            vars(module).setdefault(_SWITCHED, getattr(module, switch))
            setattr(module, switch, off)


def detach_adapters(model: nn.Module, names: Collection[str] | None = None) -> dict[str, Adapter]:
    """Take every adapter off ``model``, or those of the layers named, and return them by the names of their layers."""
    check_own(model)
    layers = adapted_layers(model)
    adapters = {name: layer.lora_detach() for name, layer in layers.items() if names is None or name in names}
    for module, switch, _, around in _inference_paths(model):
        if not any(isinstance(inner, LoRALayer) for inner in around.modules()):
            setattr(module, switch, vars(module).pop(_SWITCHED, getattr(module, switch)))
    return adapters


def move_adapters(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Move adapters from layers that are in ``model`` no more to those that took their places.

    Raises:
        AdapterStateError: there is one that cannot be adapted.
    """
    for name, layer in layers.items():
        new = submodule(model, name)
        if isinstance(new, LoRALayer):  # it is where it was, or has been moved
            continue
        kind = adapter_for(new)
        if kind is None or kind.lora_refusal(new):
            raise AdapterStateError(
                f"{name!r} of {type(model).__name__} was replaced by a {type(new).__name__}, which cannot be adapted. "
                "Leave it out of the conversion, or of the adapters: exclude_modules."
            )
        adapter = layer.lora_detach()
        adapter.kind = kind
        attach_adapters(model, {name: adapter})


def check_own(model: nn.Module) -> None:
    """Refuse to go on with layers that other code has put something over since they were adapted.

    Raises:
        AdapterStateError: there are such layers.
    """
    layers = adapted_layers(model)
    changed = [name for name, layer in layers.items() if not is_overlaid(layer) or not _has_weights(layer)]
    if changed:
        raise AdapterStateError(
            f"The weight of {listed(changed)} of {type(model).__name__} is computed since the layer was adapted (by "
            "prune, parametrize, weight_norm or the like), so that no update can be merged into it or taken off. Undo "
            "that first (prune.remove, parametrize.remove_parametrizations), and do it before inject_adapters."
        )


def _has_weights(layer: LoRALayer) -> bool:
    paths = (name.rpartition(".") for name in layer.lora_weights())
    return all(leaf in layer.get_submodule(owner)._parameters for owner, _, leaf in paths)


_SWITCHED = "_lora_switched"
"""Where a module whose inference path is off keeps what the switch was."""


def _inference_paths(model: nn.Module) -> Iterator[tuple[nn.Module, str, Any, nn.Module]]:
    """The modules that compute differently in eval mode, each with a switch, its value for off, and what must be plain.

    An encoder layer reads the weights of linear1 and linear2 and calls neither, so that adapters would be left out; an
    encoder packs a padded batch for that path, and layers off it cannot take what is packed. On some processors
    bitsandbytes lays out its weights anew for inference, and then gives no gradient to what comes before the layer.
    """
    for module in named_modules(model).values():
        if isinstance(module, nn.TransformerEncoderLayer):
            yield module, "activation_relu_or_gelu", 0, module
        elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            yield module, "use_nested_tensor", False, module
        elif repacks(module):
            yield module, "support_avx512bf16_for_cpu", False, model


def merge_layers(model: nn.Module, *, to_host: bool = False) -> dict[str, float]:
    """Merge every adapted layer of ``model``, or, if one fails, none.

    Args:
        model: The adapted model.
        to_host: Move the layers' own values to the host's memory, as is done anyway on a device that is too full to
            hold them beside the merged ones.

    Returns:
        The share of each layer's update that rounding took away.
    """
    check_own(model)
    layers = {name: layer for name, layer in adapted_layers(model).items() if not layer.lora_bases}
    _check_mergeable(model, layers)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    tied = {
        name: [weight for weight in layer.lora_weights() if uses[id(own_parameter(layer, weight))] > 1]
        for name, layer in layers.items()
    }
    lost: dict[str, float] = {}
    try:
        if not to_host:
            with suppress(torch.OutOfMemoryError):
                for name, layer in layers.items():
                    lost[name] = layer.lora_merge(tied[name])
        if len(lost) < len(layers):
            for name, layer in layers.items():
                if name not in lost:
                    lost[name] = layer.lora_merge(tied[name])
                layer.lora_bases_to_host()
    except BaseException:
        for layer in layers.values():
            layer.lora_unmerge()
        raise
    return lost


def _check_mergeable(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    """Refuse weights that no update can be merged into.

    Raises:
        AdapterStateError: there are such weights.
    """
    weights = {name: [own_parameter(each, weight) for weight in each.lora_weights()] for name, each in layers.items()}
    empty = [name for name, own in weights.items() if any(p.is_meta for p in own)]
    spread = [name for name, own in weights.items() if any(hasattr(p, "placements") for p in own)]
    for names, why in (
        (
            quantised_layers(model),
            "are quantised, and no update can be merged into them. Keep the adapters live; or merge into the model in "
            "full precision: inject_adapters(full, config), load_adapter_state_dict(full, "
            "adapter_state_dict(quantised)), merge_adapters(full).",
        ),
        (empty, "have no values yet (they are on the meta device). Load them first."),
        (spread, "are distributed (DTensor). Save the adapters, and merge them into the whole model."),
    ):
        if names:
            raise AdapterStateError(f"The weights of {listed(names)} in {type(model).__name__} {why}")


def quantised_layers(model: nn.Module) -> list[str]:
    """Return the names of adapted layers whose weights no update can be merged into."""
    return [name for name, layer in adapted_layers(model).items() if layer.lora_is_quantised(layer)]


def warn_of_merge(model: nn.Module, lost: Mapping[str, float]) -> None:
    """Say what a merge lost, if it is much, and which ties it broke."""
    untied = [name for name, _, base in merged_weights(model) if name in lost and isinstance(base, nn.Parameter)]
    if untied:
        warnings.warn(
            f"The weight of {listed(untied)} in {type(model).__name__} was tied to another layer's, and the merge "
            "changes its own use alone: they are two weights now. A state dict of them loads rightly only where they "
            "are not tied (in transformers, config.tie_word_embeddings=False).",
            LoRAWarning,
            stacklevel=3,
        )
    overflown = [name for name, share in lost.items() if not share < math.inf]
    if overflown:
        warnings.warn(
            f"Merging gave values that the dtype of {listed(overflown)} in {type(model).__name__} cannot hold: the "
            "weights are infinite now. Call unmerge_adapters(model), and convert the model to float32 or bfloat16 "
            "before merging.",
            MergePrecisionWarning,
            stacklevel=3,
        )
    much = {name: share for name, share in lost.items() if _MUCH < share < math.inf}
    if much:
        worst = max(much, key=much.__getitem__)
        warnings.warn(
            f"Merging rounded away {much[worst]:.0%} of the update of {worst!r} in {type(model).__name__}, and more "
            f"than {_MUCH:.0%} in {len(much)} of {len(lost)} layers: half-precision weights cannot hold changes so "
            "small. The merged model computes less of the fine-tune than the adapted one. Keep the adapters live "
            "(merge=False, unmerge_adapters), or convert the model to float32 before merging.",
            MergePrecisionWarning,
            stacklevel=3,
        )


_MUCH = 0.25
"""A share of an update (in norm) that is worth a warning. Rounding noise of a tenth or two is usual in bfloat16."""


def fold(model: nn.Module) -> dict[str, float]:
    """Make ``model`` plain, its updates merged, and let it remember how to come back. Return what merging lost.

    The base's own values lie in the host's memory then: most often nobody asks for them.
    """
    record, lost = record_of(model), dict[str, float]()
    if not record.folded:
        lost = merge_layers(model, to_host=True)
        unfreeze(model, record)
        record.folded = detach_adapters(model)
        weights = named_parameters(model, remove_duplicate=False)
        names = (f"{name}.{weight}" for name, adapter in record.folded.items() for weight in adapter.bases)
        record.folded_digests = {name: digest(weights[name]) for name in names}
    return lost


def unfold(model: nn.Module) -> bool:
    """Undo :func:`fold`: the exact base, the same adapters on it. Return whether there was anything to undo.

    If the merged weights are not those that folding left (someone loaded others), they are the base from now on.
    """
    record = find_record(model)
    if record is None or not record.folded:
        return False
    taken = [name for name, layer in adapted_layers(model).items() if name in record.folded]
    if taken:
        raise AdapterStateError(
            f"{listed(taken)} of {type(model).__name__} have live adapters of another model that shares them, and "
            "cannot get their own back. Call remove_adapters on that model first, or give each model layers of its own."
        )
    if not is_as_folded(model, record):
        forget_record(model)
        warnings.warn(
            f"The weights of {type(model).__name__} were replaced after its adapters were merged into them: they are "
            "taken as a new base, and the adapters of the earlier fine-tune are dropped.",
            LoRAWarning,
            stacklevel=2,
        )
        return False
    adapters, record.folded, record.folded_digests = record.folded, {}, {}
    for name, adapter in adapters.items():  # which do not follow a plain model to another device
        for factor in adapter.parameters.values():
            factor.data = factor.data.to(own_parameter(submodule(model, name), adapter.parts[0].weight).device)
    attach_adapters(model, adapters)
    for layer in adapted_layers(model).values():
        layer.lora_unmerge()
    freeze(model, record)
    return True


def check_as_folded(model: nn.Module) -> None:
    """Refuse to speak for adapters whose merged weights were replaced since.

    Raises:
        AdapterStateError: they were.
    """
    if not is_as_folded(model, record_of(model)):
        raise AdapterStateError(
            f"The weights of {type(model).__name__} were replaced or converted after its adapters were merged into "
            "them, so that neither its base nor its adapters are known any more. Load both anew, or call "
            "remove_adapters(model) to go on from the weights as they are."
        )


def is_as_folded(model: nn.Module, record: Record) -> bool:
    """Whether a model that :func:`fold` made plain, if it did, still has the weights that this left."""
    return not record.folded or shows(model, record.folded_digests)

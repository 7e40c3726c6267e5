"""Adapters on their layers and off them; updates in the weights and out of them.

A folded model is a plain one that remembers: its classes and keys are the base's, its weights have the updates merged,
and the adapters and the base's own values lie in its record.
"""

import warnings
from collections import Counter
from collections.abc import Mapping

from torch import nn

from lightning_lora.adapted import Record, adapted_layers, find_record, forget_record, freeze, record_of, unfreeze
from lightning_lora.errors import AdapterStateError, LoRAWarning
from lightning_lora.functional import digest
from lightning_lora.layers import Adapter, LoRALayer, attach
from lightning_lora.names import named_modules, submodule


def attach_adapters(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Put adapters on the layers of ``model`` that they are named after."""
    for name, adapter in adapters.items():
        attach(submodule(model, name), adapter)
    for encoder in _encoder_layers(model):
        if any(isinstance(child, LoRALayer) for child in encoder.children()):
            vars(encoder).setdefault(_ACTIVATION, encoder.activation_relu_or_gelu)
            encoder.activation_relu_or_gelu = 0


def detach_adapters(model: nn.Module) -> dict[str, Adapter]:
    """Take every adapter off ``model`` and return them by the names of their layers."""
    for encoder in _encoder_layers(model):
        encoder.activation_relu_or_gelu = vars(encoder).pop(_ACTIVATION, encoder.activation_relu_or_gelu)
    return {name: layer.lora_detach() for name, layer in adapted_layers(model).items()}


_ACTIVATION = "_lora_activation"
"""Where an encoder layer keeps its ``activation_relu_or_gelu``. Torch's inference path is taken only if that is not 0:
it reads the weights of linear1 and linear2 and calls neither, so that adapters would be left out in eval mode."""


def _encoder_layers(model: nn.Module) -> list[nn.TransformerEncoderLayer]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]


def merge_layers(model: nn.Module) -> None:
    """Merge every adapted layer of ``model``, or, if one fails (for want of memory), none."""
    layers = [layer for layer in adapted_layers(model).values() if layer.lora_base is None]
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    try:
        for layer in layers:
            layer.lora_merge(tied=uses[id(layer.weight)] > 1)
    except BaseException:
        for layer in layers:
            layer.lora_unmerge()
        raise


def fold(model: nn.Module) -> None:
    """Make ``model`` plain, its updates merged, and let it remember how to come back."""
    record = record_of(model)
    if not record.folded:
        merge_layers(model)
        unfreeze(model, record)
        record.folded = detach_adapters(model)
        record.folded_digests = {name: digest(submodule(model, name).get_parameter("weight")) for name in record.folded}


def unfold(model: nn.Module) -> bool:
    """Undo :func:`fold`: the exact base, the same adapters on it. Return whether there was anything to undo.

    If the merged weights are not those that folding left (someone loaded others), they are the base from now on.
    """
    record = find_record(model)
    if record is None or not record.folded:
        return False
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
        for factor in (adapter.lora_A, adapter.lora_B):
            factor.data = factor.data.to(submodule(model, name).get_parameter("weight").device)
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
    modules = named_modules(model)
    weights = {name: modules[name]._parameters.get("weight") if name in modules else None for name in record.folded}
    return all(p is not None and digest(p) == record.folded_digests[name] for name, p in weights.items())

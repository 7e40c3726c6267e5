"""The base again, from the merged weights of a checkpoint that also holds the adapters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base.fingerprints import Fingerprint, find_same_form
from lightning_lora.functional.dtypes import wide
from lightning_lora.layers import LoRALayer
from lightning_lora.model.view import View, view_of
from lightning_lora.storage.merged_state import replaced_values
from lightning_lora.storage.same_base.base_changes import changes_between
from lightning_lora.storage.same_base.fingerprint import fingerprint
from lightning_lora.storage.stored import KEY
from lightning_lora.tensors.dicts import only, renamed
from lightning_lora.tensors.names import own_parameter, plain_name
from lightning_lora.tensors.plain_states import StateDict
from lightning_lora.tensors.values import replace_values


def restore_base_from(
    model: nn.Module, merged: StateDict, checkpoint: Mapping[str, Any]
) -> bool:
    """Make the base again, if a model has the merged weights of a checkpoint.

    A Trainer calls this before it goes on from a checkpoint that holds a merged model
    beside its adapters. Code without adapters may have loaded that merged model into
    the module before. Then the module's adapters are fresh, and merged weights are where
    the base's belong.

    Args:
        model: The adapted model. It may have those merged weights, or the base's.
        merged: The merged weights. It is empty if the checkpoint has none.
        checkpoint: The checkpoint, with adapters alone as its state.

    Returns:
        Whether the model had the merged weights, and has the base's now.
    """
    if not merged:
        return False
    view = view_of(model)
    adapters = only(checkpoint["state_dict"], view.adapter_parameters)
    base_of_training = _base_of_training(view, checkpoint)
    if base_of_training is None or not _can_be_taken_out(view, merged, adapters):
        return False
    _take_updates_out(view, adapters)
    _note_as_base_of_training(view, base_of_training)
    return True


def _base_of_training(view: View, checkpoint: Mapping[str, Any]) -> Fingerprint | None:
    """The fingerprint in a checkpoint that has the form of the base here: the same names, shapes and dtypes."""
    return find_same_form(checkpoint[KEY]["base"], fingerprint(view, anew=False))


def _note_as_base_of_training(view: View, base_of_training: Fingerprint) -> None:
    """Note that the model's base is the one of the training, up to rounding.

    Weights whose bits are others now count as those of the training: see
    ``Base.computed_back``.
    """
    base_computed_back = fingerprint(view, anew=False)
    differing = changes_between(view, base_of_training, base_computed_back)
    view.record.base.note_computed_back(differing)


def _take_updates_out(view: View, adapters: StateDict) -> None:
    """Subtract the updates of these adapters from the model's weights.

    The weights are the base's then, up to rounding. The model's own adapters have these
    values only meanwhile.
    """
    with replaced_values(view, adapters), torch.no_grad():
        for layer in view.layers.values():
            _take_update_out(layer)


def _take_update_out(layer: LoRALayer) -> None:
    """Subtract the update of a layer from its weights, which are merged ones."""
    for name in layer.lora_weights():
        merged_weight = own_parameter(layer, name)
        # the layer adds its update to what it has: here, it is added a second time
        with_two_updates = layer.lora_effective_weight(name)
        update = with_two_updates.sub_(merged_weight)
        base = merged_weight.to(wide(merged_weight.dtype)) - update
        replace_values(merged_weight, base.to(merged_weight.dtype))
    layer.lora_weights_changed()


def _can_be_taken_out(view: View, merged: StateDict, adapters: StateDict) -> bool:
    """Whether a model has merged weights, from which the file's updates can be subtracted.

    The model's own adapters must be fresh: those that have learned belong to the weights
    that are there. The costly test, of all weights, comes last.
    """
    have_one_shape = _shapes_of(adapters) == _shapes_of(view.adapter_parameters)
    return (
        have_one_shape
        and _is_exact_sum(view)
        and view.is_fresh()
        and _has_weights(view, renamed(merged, plain_name))
    )


def _shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes of tensors by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def _is_exact_sum(view: View) -> bool:
    """Whether a merged weight is the base's weight plus the update, in float32 or wider.

    DoRA scales the sum, a narrower dtype rounds it, and shards hold parts of it.
    """
    uses_dora = any(layer.lora_settings.use_dora for layer in view.layers.values())
    is_rounded = any(
        _is_narrow(parameter) for parameter in view.base_parameters.values()
    )
    return not (uses_dora or is_rounded or view.is_sharded)


def _is_narrow(parameter: Tensor) -> bool:
    """Whether a parameter is less precise than float32."""
    return parameter.is_floating_point() and parameter.element_size() < 4


def _has_weights(view: View, merged: StateDict) -> bool:
    """Whether all weights of the model have the values of a file's merged ones."""
    if not view.base_parameters.keys() <= merged.keys():
        return False
    return all(
        torch.equal(parameter.cpu(), merged[name].cpu())
        for name, parameter in view.base_parameters.items()
    )

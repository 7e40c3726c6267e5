"""The base again, from the merged weights of a checkpoint that also holds the adapters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.base.fingerprints import find_same_form
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
    """Make the base from a checkpoint's merged weights.

    Code without adapters loads these before it resumes a run.

    Args:
        model: The model, perhaps with those weights.
        merged: The merged weights. It is empty if the checkpoint has none.
        checkpoint: The checkpoint, with adapters alone as its state.

    Returns:
        Whether the model had those weights, and has the base's now.
    """
    if not merged:
        return False
    view = view_of(model)
    base_of_training = find_same_form(
        checkpoint[KEY]["base"], fingerprint(view, anew=False)
    )
    adapters = only(checkpoint["state_dict"], view.adapter_parameters)
    if base_of_training is None or not _can_be_taken_out(view, merged, adapters):
        return False
    _take_updates_out(view, adapters)
    base_computed_back = fingerprint(view, anew=False)  # the same, up to rounding
    view.record.base.note_computed_back(
        changes_between(view, base_of_training, base_computed_back)
    )
    return True


def _take_updates_out(view: View, adapters: StateDict) -> None:
    """Subtract the updates of these adapters from the model's weights.

    The weights are the base's then, up to rounding.
    """
    with replaced_values(view, adapters), torch.no_grad():
        for layer in view.layers.values():
            _take_update_out(layer)


def _take_update_out(layer: LoRALayer) -> None:
    """Subtract the update of a layer from its weights."""
    for name in layer.lora_weights():
        weight = own_parameter(layer, name)
        # the effective weight is the present weight (now the merged one) + the update
        update = layer.lora_effective_weight(name).sub_(weight)
        base = weight.to(wide(weight.dtype)) - update
        replace_values(weight, base.to(weight.dtype))
    layer.lora_weights_changed()


def _can_be_taken_out(view: View, merged: StateDict, adapters: StateDict) -> bool:
    """Whether a file's updates can be subtracted from the weights of a model.

    Its ``adapters`` must be those of the model's layers. The model must have the file's
    ``merged`` weights, and adapters that have learned nothing yet.
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
    """Whether an update can be subtracted again: not from a scaled, rounded or sharded sum."""
    uses_dora = any(layer.lora_settings.use_dora for layer in view.layers.values())
    is_rounded = any(
        _is_narrow(parameter) for parameter in view.base_parameters.values()
    )
    return not (uses_dora or is_rounded or view.is_sharded)


def _is_narrow(parameter: Tensor) -> bool:
    """Whether it is less precise than float32."""
    return parameter.is_floating_point() and parameter.element_size() < 4


def _has_weights(view: View, merged: StateDict) -> bool:
    """Whether all weights of the model are those of a file."""
    if not view.base_parameters.keys() <= merged.keys():
        return False
    return all(
        torch.equal(parameter.cpu(), merged[name].cpu())
        for name, parameter in view.base_parameters.items()
    )

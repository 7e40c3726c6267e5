"""Show the base in place of the active adapter, and the adapter again."""

import torch
from torch import Tensor

from lightning_lora.model.base_values import known_original, tensors_with_originals
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import only, where, with_values
from lightning_lora.tensors.names import first_names
from lightning_lora.tensors.shards import is_dtensor, reshard
from lightning_lora.tensors.values import replace_values, set_aside, set_requires_grad


# in inference mode, a parameter would become an inference tensor and never train again
@torch.inference_mode(False)
def show_base(view: View) -> None:
    """Turn the updates off.

    Merged weights, and what was trained beside the adapters, get the base's values. The
    record keeps their own values and flags (``Base.hidden``) for ``show_adapter``.
    """
    base_values = _base_values_to_show(view)
    _keep_digests_of_distributed_weights(view)
    # the base's own parameter of a tied weight may be in no module while it is merged:
    # it stays as it is
    in_model = first_names(view.tensors)
    for name, tensor in with_values(in_model, base_values).items():
        _hide(view, name, tensor)
        replace_values(tensor, base_values[tensor])
    _enable(view, has_effect=False)
    view.record.note_base_shown()


def _hide(view: View, name: str, tensor: Tensor) -> None:
    """Note what a tensor holds, before it gets the base's values, and let it train no more."""
    # replace_values writes into the memory of a DTensor: so its values are copied
    values = set_aside(tensor) if is_dtensor(tensor) else tensor.data
    view.record.base.note_hidden(name, values, requires_grad=tensor.requires_grad)
    # a gradient at the base's values would move what was trained
    set_requires_grad(tensor, False)


def _base_values_to_show(view: View) -> dict[Tensor, Tensor]:
    """Copies of the base's values, by the tensors that may have other values.

    They are the originals that the active adapter keeps, and the base's values of
    merged weights.
    """
    values = dict[Tensor, Tensor]()
    for name, tensor in tensors_with_originals(view).items():
        original = known_original(view, name)
        if original is not None:
            values[tensor] = original.to(tensor, copy=True)
    for merged in view.merged_weights:
        # the base of a tied weight is the parameter of its other uses, which may have
        # trained there: then the loop above has found its original
        base = values.get(merged.base_value, merged.base_value)
        values[merged.parameter] = base.detach().to(merged.parameter)
    return values


def _keep_digests_of_distributed_weights(view: View) -> None:
    """Keep the digests of a merged model's DTensors, before their memory is written into.

    When they are compared later, only these tell that they are as merged.
    """
    distributed = where(view.parameters, is_dtensor)
    for seen in only(view.record.base.after_merge.seen, distributed).values():
        seen.digest()  # the first call computes it, and ``seen`` keeps it


@torch.inference_mode(False)
def show_adapter(view: View) -> None:
    """Give the active adapter, or the merged weights, their effect back."""
    # so that the next forward pass of FSDP2 gathers what is put back
    reshard(view.model)
    hidden_tensors = only(view.record.base.hidden, view.tensors)
    # the model may have been moved or converted since. All values are converted before
    # any is put back: so an error changes nothing
    converted = dict[str, Tensor]()
    for name, hidden in hidden_tensors.items():
        converted[name] = hidden.values.to(view.tensors[name])
    for name, hidden in hidden_tensors.items():
        replace_values(view.tensors[name], converted[name])
        set_requires_grad(view.tensors[name], hidden.requires_grad)
    _enable(view, has_effect=True)
    view.record.note_adapter_shown()


def _enable(view: View, *, has_effect: bool) -> None:
    """Turn the updates of all layers on or off."""
    for layer in view.layers.values():
        layer.lora_enabled = has_effect
    torch.clear_autocast_cache()  # it may hold copies of the values from before

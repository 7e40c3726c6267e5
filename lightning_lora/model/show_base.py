"""Show the base in place of the active adapter, and the adapter again."""

import torch
from torch import Tensor

from lightning_lora.model.base_values import tensors_with_originals
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import only, where, with_values
from lightning_lora.tensors.names import first_names
from lightning_lora.tensors.shards import is_dtensor, reshard
from lightning_lora.tensors.values import replace_values, set_aside, set_requires_grad


# in inference mode, a parameter would become an inference tensor and never train again
@torch.inference_mode(False)
def show_base(view: View) -> None:
    """Turn the updates off.

    Merged weights and what was trained beside them get the base's values.
    """
    values = _values_to_show(view)
    _read_merged_digests(view)
    # a parameter that was tied may be in no module until the unmerge: it stays as it is
    present = first_names(view.tensors)
    for name, tensor in with_values(present, values).items():
        # replace_values writes into the memory of a spread tensor: so it is copied
        hidden = set_aside(tensor) if is_dtensor(tensor) else tensor.data
        view.record.base.note_hidden(name, hidden, requires_grad=tensor.requires_grad)
        # a gradient at the base's values would move what was trained
        set_requires_grad(tensor, False)
        replace_values(tensor, values[tensor])
    _enable(view, has_effect=False)
    view.record.note_base_shown()


def _values_to_show(view: View) -> dict[Tensor, Tensor]:
    """The tensors that may have other values than the base, and copies of the base's."""
    values = dict[Tensor, Tensor]()
    record = view.record
    for name, tensor in tensors_with_originals(view).items():
        original = record.adapter.originals[name]
        # without values here, the model was adapted before it had any
        has_base_value = not original.is_meta
        if has_base_value and name not in record.base.filled:
            values[tensor] = original.to(tensor, copy=True)
    for merged in view.merged_weights:
        # a tied weight's other use may have trained
        base = values.get(merged.base_value, merged.base_value)
        values[merged.parameter] = base.detach().to(merged.parameter)
    return values


def _read_merged_digests(view: View) -> None:
    """Read spread weights of a merged model: their memory is written into, and only a digest tells the values apart."""
    spread = where(view.parameters, is_dtensor)
    for seen in only(view.record.base.after_merge.seen, spread).values():
        seen.digest()  # it keeps the digest that it computes


@torch.inference_mode(False)
def show_adapter(view: View) -> None:
    """Give the active adapter, or the merged weights, their effect back."""
    reshard(view.model)  # so that the next forward pass gathers what is put back
    hidden_tensors = only(view.record.base.hidden, view.tensors)
    # all are converted before any is written: so an error changes nothing
    converted = dict[str, Tensor]()
    for name, hidden in hidden_tensors.items():
        # the tensors of the model may have been moved or converted since
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
    torch.clear_autocast_cache()  # it may hold copies of the other values

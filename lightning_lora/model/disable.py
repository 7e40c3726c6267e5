"""Run the base model for a while, without adapters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lightning_lora.model.merged import check_as_merged
from lightning_lora.model.state import find_record
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.shards import is_dtensor, reshard
from lightning_lora.tensors.values import replace_values, set_aside, set_requires_grad


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base model inside a ``with`` block.

    The updates are off. Everything else that was trained has the base's own values, and gets no gradient.

    Args:
        model: The model that ``inject_adapters`` was called on, adapted or merged.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights were changed.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(4)
        >>> base = model(x)
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> _ = nn.init.ones_(model[0].lora_B)
        >>> with disable_adapters(model):
        ...     torch.equal(model(x), base)
        True
        >>> torch.equal(model(x), base)
        False
    """
    record = find_record(model)
    if record is not None and record.is_disabled:
        yield
        return
    check_as_merged(model)
    view = view_of(model)
    with ExitStack() as back:
        _show_base(view, back)
        for layer in view.layers.values():
            back.callback(setattr, layer, "lora_enabled", True)
            layer.lora_enabled = False
        back.callback(view.record.set_disabled, False)
        view.record.set_disabled(True)
        back.callback(reshard, model)  # so that the next forward pass gathers what is put back
        yield


@torch.inference_mode(False)  # where a parameter would become an inference tensor, which never trains again
def _show_base(view: View, back: ExitStack) -> None:
    """Let merged weights, and what was trained beside the adapters, hold the base's values for a while."""
    values: dict[int, tuple[Tensor, Tensor]] = {}
    for name, tensor in view.kept.items():
        original = view.adapter.originals[name].to(tensor, copy=True)
        if not original.is_meta:  # the model was adapted before it had values
            values[id(tensor)] = tensor, original
    for weight in view.merged:
        _, base = values.get(id(weight.base), (None, weight.base))  # a tied weight's other use may have trained
        values[id(weight.shown)] = weight.shown, base.detach().to(weight.shown)
    merge = view.record.merge
    for name, seen in {**merge.weights, **merge.others}.items() if merge else ():
        if is_dtensor(view.parameters.get(name)):
            seen.digest()  # the values are written into the same memory: later, only their digest tells them apart
    back.callback(torch.clear_autocast_cache)  # it may hold copies of the other values
    for tensor, base in values.values():
        back.callback(_put_back, tensor, set_aside(tensor) if is_dtensor(tensor) else tensor.data)
        back.callback(set_requires_grad, tensor, tensor.requires_grad)
        set_requires_grad(tensor, False)  # a gradient at the base's values would move what was trained
        replace_values(tensor, base)
    torch.clear_autocast_cache()


@torch.inference_mode(False)
def _put_back(tensor: Tensor, values: Tensor) -> None:
    if values.dtype is not tensor.dtype or values.device != tensor.device:  # converted or moved inside the block
        values = values.to(tensor)
    replace_values(tensor, values)

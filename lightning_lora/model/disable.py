"""Run the base model for a while, without adapters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_lora.model.merge import check_as_merged, unmerged
from lightning_lora.model.record import find_record
from lightning_lora.model.view import View
from lightning_lora.tensors.values import replace_values


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base model inside a ``with`` block.

    The updates are off. Everything else that was trained has the base's own values.

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
    if record is not None and record.disabled:
        yield
        return
    check_as_merged(model)
    with unmerged(model), _base_alone(View(model)):
        yield


@contextmanager
def _base_alone(view: View) -> Iterator[None]:
    """Turn the adapters off, and restore the base's values of everything else that was trained."""
    record, present = view.record, view.kept
    trained = {name: tensor.data for name, tensor in present.items()}
    own = {name: record.originals[name].to(tensor, copy=True) for name, tensor in present.items()}
    try:
        for name, tensor in present.items():
            if not own[name].is_meta:  # meta if the model was adapted before it had values
                replace_values(tensor, own[name])
        for layer in view.layers.values():
            layer.lora_enabled = False
        record.disabled = True
        torch.clear_autocast_cache()  # it holds copies of the trained values
        yield
    finally:
        record.disabled = False
        for layer in view.layers.values():
            layer.lora_enabled = True
        for name, tensor in present.items():
            replace_values(tensor, trained[name])
        torch.clear_autocast_cache()

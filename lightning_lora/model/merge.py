"""Fold the updates into the weights and take them out again, exactly; or run the base model for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.model.attach import check_as_folded, fold, merge_layers, unfold, warn_of_merge
from lightning_lora.model.record import adapted_layers, find_record, kept_tensors, record_of


def merge_adapters(model: nn.Module) -> None:
    r"""Fold :math:`\Delta W` into the weights: the model computes the same, at the cost of the base model.

    The sum is computed in float32 or wider and rounded once. A weight that is tied to another use (an embedding and an
    output head) changes only where it is adapted. The adapters stay, idle, for :func:`unmerge_adapters`, and so do the
    base's own values (on a GPU without room for both, in the host's memory); ``remove_adapters`` makes the merge final.
    Merging twice is merging once.

    Args:
        model: The model that ``inject_adapters`` was called on.

    Raises:
        AdapterStateError: ``model`` has no adapters.

    Warns:
        MergePrecisionWarning: the weights are in half precision, and rounding took much of an update away.

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1, "No Additional Inference
        Latency".
    """
    if not record_of(model).folded:
        warn_of_merge(model, merge_layers(model))


def unmerge_adapters(model: nn.Module) -> None:
    """Take the updates out of the weights again: every bit of the base is as it was, and the adapters are live.

    It also brings back the adapters that a finished ``Trainer.fit`` merged.

    Args:
        model: A model that :func:`merge_adapters`, or a Trainer with a ``LoRACallback``, was run on.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights were changed since.
    """
    check_as_folded(model)
    unfold(model)
    layers = adapted_layers(model)
    changed = [name for name, layer in layers.items() if not layer.lora_is_as_merged()]
    if changed:
        raise AdapterStateError(
            f"The merged weights of {listed(changed)} in {type(model).__name__} were changed since the merge, and "
            "un-merging would lose that. Call remove_adapters(model) to go on from the weights as they are."
        )
    for layer in layers.values():
        layer.lora_unmerge()


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base model inside a ``with`` block: no updates, and the base's own values of all that was trained.

    Args:
        model: The model that ``inject_adapters`` was called on, adapted or merged.

    Raises:
        AdapterStateError: ``model`` has no adapters.

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
    check_as_folded(model)
    record = record_of(model)
    was_folded = unfold(model)
    layers = adapted_layers(model).values()
    was_merged = any(layer.lora_bases for layer in layers)
    unmerge_adapters(model)
    present = kept_tensors(model)
    trained = {name: tensor.data for name, tensor in present.items()}
    own = {name: record.originals[name].to(tensor, copy=True) for name, tensor in present.items()}
    try:
        for name, tensor in present.items():
            if not own[name].is_meta:  # of a model that was adapted before it had values
                tensor.data = own[name]
        for layer in layers:
            layer.lora_enabled = False
        record.disabled = True
        torch.clear_autocast_cache()  # which holds copies of the other values
        yield
    finally:
        record.disabled = False
        for layer in layers:
            layer.lora_enabled = True
        for name, tensor in present.items():
            tensor.data = trained[name]
        torch.clear_autocast_cache()
        if was_merged:
            merge_layers(model)
        if was_folded:
            fold(model)

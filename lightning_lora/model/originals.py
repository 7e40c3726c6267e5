"""The base's own values of everything that training may change beside the adapters."""

from collections.abc import Iterable

from lightning_lora.model.view import View
from lightning_lora.tensors.values import copy_to_host, replace_values, same_bits


def keep_originals(view: View) -> None:
    """Copy to the host what training may change, where that was not done before."""
    record = view.record
    changing = {**view.trained, **view.buffers}
    changing |= {name: view.base[name] for name in record.originals if name in view.base}  # values that a file gave
    originals = {}
    for name, tensor in changing.items():
        known = record.originals.get(name)
        originals[name] = known if known is not None and known.shape == tensor.shape else copy_to_host(tensor)
    record.originals = originals


def keep_frozen(view: View, names: Iterable[str]) -> None:
    """Copy frozen weights to the host that are about to get other values, where the base's are known."""
    record = view.record
    for name in names:
        if name not in record.originals and name not in record.changed:
            record.originals[name] = copy_to_host(view.base[name])


def restore_originals(view: View, names: Iterable[str]) -> None:
    """Write the base's own values of ``names`` back."""
    originals, present = view.record.originals, view.kept
    for name in names:
        original, tensor = originals[name], present[name].data
        if original.is_meta or same_bits(tensor, original):
            continue
        if tensor.shape == original.shape:
            tensor.copy_(original)
        else:  # a buffer that grew
            replace_values(present[name], original.to(tensor, copy=True))

"""Keep and restore base values that training may change.

These are values besides the adapters, such as modules trained in full, biases and buffers.
"""

from collections.abc import Iterable
from contextlib import ExitStack

from lightning_lora.model.view import View
from lightning_lora.tensors.values import copy_to_host, replace_values, same_bits


def keep_originals(view: View) -> None:
    """Copy to CPU memory the values that training may change.

    Values that were copied before are kept.
    """
    record = view.record
    changing = {**view.trained, **view.buffers}
    changing |= {name: view.base[name] for name in record.originals if name in view.base}  # replaced by a file's
    originals = {}
    for name, tensor in changing.items():
        known = record.originals.get(name)
        originals[name] = known if known is not None and known.shape == tensor.shape else copy_to_host(tensor)
    record.originals = originals


def keep_frozen(view: View, names: Iterable[str]) -> None:
    """Copy frozen weights to CPU memory before they change.

    Weights whose base values are already copied or lost are skipped.
    """
    record = view.record
    for name in names:
        if name not in record.originals and name not in record.changed:
            record.originals[name] = copy_to_host(view.base[name])


def restore_originals(view: View, names: Iterable[str], undo: ExitStack) -> None:
    """Write the base's original values of ``names`` back.

    Args:
        view: The adapted model.
        names: What to write.
        undo: Gets callbacks that write the current values again.
    """
    originals, present = view.record.originals, view.kept
    for name in names:
        original, tensor = originals[name], present[name].data
        if original.is_meta or same_bits(tensor, original):
            continue
        if tensor.shape == original.shape:
            undo.callback(tensor.copy_, tensor.clone())
            tensor.copy_(original)
        else:  # a buffer that has grown
            undo.callback(replace_values, present[name], tensor)
            replace_values(present[name], original.to(tensor, copy=True))

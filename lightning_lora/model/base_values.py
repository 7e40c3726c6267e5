"""The base's values of everything in a model: as they are there, or kept while training changes them."""

from collections.abc import Iterable
from contextlib import suppress
from io import BytesIO

import torch
from torch import Tensor, nn

from lightning_lora.model.view import View
from lightning_lora.private import EXTRA_STATE
from lightning_lora.tensors.dicts import only, without
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join
from lightning_lora.tensors.undo import Undo
from lightning_lora.tensors.values import replace_values, same_bits


def tensors_with_originals(view: View) -> dict[str, Tensor]:
    """Return the model's tensors whose base values the active adapter keeps, in its order."""
    present = view.base_tensors
    return {name: present[name] for name in view.adapter.originals if name in present}


def frozen_values(view: View) -> dict[str, Tensor]:
    """Return the values of the frozen parameters without updates."""
    bases = dict[nn.Parameter, Tensor]()
    for merged in view.merged_weights:
        # it may have been converted since
        bases[merged.parameter] = merged.base_value.to(merged.parameter.dtype)
    return {
        name: bases.get(parameter, parameter)
        for name, parameter in view.frozen_base.items()
    }


def base_values(view: View) -> dict[str, Tensor]:
    """Return the values of what does not train: frozen weights without updates, and buffers as they were before."""
    values = frozen_values(view)
    originals = view.adapter.originals
    for name, tensor in without(
        tensors_with_originals(view), view.trainable_base
    ).items():
        values[name] = originals[name].to(tensor.dtype)
    return {**values, **view.quantised_entries}


def kept_or_present_value(view: View, name: str) -> Tensor:
    """Return the base's value of a tensor that the adapter keeps, otherwise the value that is there.

    Of a merged weight, that holds the update: callers ask for what trains in full, and
    for buffers.
    """
    if view.is_adapted and name in view.adapter.originals:
        return view.adapter.originals[name]
    return view.base_tensors[name].detach()


def digests_of_extra_state(view: View) -> dict[str, int]:
    """Return the digests of what modules keep besides tensors (``get_extra_state``).

    Names are as in a state dict.
    """
    found = {}
    for name, module in view.modules.items():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            with suppress(Exception):  # of code for any objects: these are not compared
                file = BytesIO()
                torch.save(module.get_extra_state(), file)
                found[join(name, EXTRA_STATE)] = digest(
                    torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
                )
    return found


# Before training changes them, and after


def keep_originals(view: View) -> None:
    """Copy to CPU memory the values that training may change.

    Values that were copied before are kept.
    """
    changing = {**view.trainable_base, **view.buffers}
    # replaced by a file's
    changing.update(only(view.base_parameters, view.adapter.originals))
    view.adapter.keep_originals(changing, digests_of_extra_state(view))


def keep_frozen(view: View, names: Iterable[str]) -> None:
    """Copy frozen weights to CPU memory before they change.

    Skip those whose base values are already copied or lost.
    """
    are_known = {*view.adapter.originals, *view.record.base.changes}
    view.adapter.set_originals(only(view.base_parameters, set(names) - are_known))


def restore_originals(view: View, names: Iterable[str], undo: Undo) -> None:
    """Write the base's original values of ``names`` back.

    ``undo`` gets callbacks that write the current values.
    """
    present = tensors_with_originals(view)
    originals = view.adapter.originals
    for name in names:
        _write_original(present[name], originals[name], undo)


def _write_original(tensor: Tensor, original: Tensor, undo: Undo) -> None:
    """Write one original value back, if there is one."""
    values = tensor.data
    if original.is_meta or same_bits(values, original):
        return
    if values.shape == original.shape:
        undo.callback(values.copy_, values.clone())
        values.copy_(original)
    else:  # a buffer that has grown
        undo.callback(replace_values, tensor, values)
        replace_values(tensor, original.to(values, copy=True))

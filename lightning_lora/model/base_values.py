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
    """Return the model's tensors whose base values the active adapter keeps (``AdapterState.originals``)."""
    present = view.base_tensors
    return {name: present[name] for name in view.adapter.originals if name in present}


def known_original(view: View, name: str) -> Tensor | None:
    """Return the original of a tensor, or None if there is none, or it is not the base's value.

    On the meta device, it has no values: the model was adapted before it had some. And
    what hooks fill in, perhaps from data, is not the base's.
    """
    original = view.adapter.originals.get(name)
    if original is None or original.is_meta or name in view.record.base.filled:
        return None
    return original


def frozen_values(view: View) -> dict[str, Tensor]:
    """Return the values of the frozen parameters without updates."""
    bases = dict[nn.Parameter, Tensor]()
    for merged in view.merged_weights:
        # the model may have been converted since the merge
        bases[merged.parameter] = merged.base_value.to(merged.parameter.dtype)
    return {
        name: bases.get(parameter, parameter)
        for name, parameter in view.frozen_base.items()
    }


def base_values(view: View) -> dict[str, Tensor]:
    """Return the values of what does not train: frozen weights without updates, and buffers as they were before."""
    values = frozen_values(view)
    originals = view.adapter.originals
    kept = without(tensors_with_originals(view), view.trainable_base)
    for name, tensor in kept.items():
        values[name] = originals[name].to(tensor.dtype)
    return {**values, **view.quantised_entries}


def kept_or_present_value(view: View, name: str) -> Tensor:
    """Return the base's value of a tensor that the adapter keeps, otherwise the value that is there.

    A merged weight's value would have the update in it: so callers do not ask for
    these, but for what trains in full, and for buffers.
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
            # the state may be any object. What cannot be saved is not compared
            with suppress(Exception):
                file = BytesIO()
                torch.save(module.get_extra_state(), file)
                found[join(name, EXTRA_STATE)] = digest(
                    torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
                )
    return found


# Before training changes them, and after


def keep_originals(view: View) -> None:
    """Copy to CPU memory the values that training may change.

    Values that were copied before are kept, also those that ``keep_frozen`` has copied.
    """
    view.adapter.note_extra_state(digests_of_extra_state(view))
    view.adapter.keep_originals(
        {**view.trainable_base, **view.buffers, **tensors_with_originals(view)}
    )


def keep_frozen(view: View, names: Iterable[str]) -> None:
    """Copy frozen weights to CPU memory before they change.

    A file changes some, and others follow the network that they are a copy of. Weights
    are skipped if their base values were copied before, or are lost, because other code
    has changed them.
    """
    copied_or_lost = {*view.adapter.originals, *view.record.base.changes}
    to_copy = set(names) - copied_or_lost
    view.adapter.set_originals(only(view.base_parameters, to_copy))


def restore_originals(view: View, names: Iterable[str], undo: Undo) -> None:
    """Write the base's original values of ``names`` back.

    ``undo`` gets callbacks that write the current values.
    """
    present = tensors_with_originals(view)
    originals = view.adapter.originals
    for name in names:
        _write_original(present[name], originals[name], undo)


def _write_original(tensor: Tensor, original: Tensor, undo: Undo) -> None:
    """Write one original value back, if there is one.

    On the meta device, there is none: the model was adapted before it had values.
    """
    values = tensor.data
    if original.is_meta or same_bits(values, original):
        return
    if values.shape == original.shape:
        undo.callback(values.copy_, values.clone())
        values.copy_(original)
    else:  # the tensor is a buffer that has another size since
        undo.callback(replace_values, tensor, values)
        replace_values(tensor, original.to(values, copy=True))

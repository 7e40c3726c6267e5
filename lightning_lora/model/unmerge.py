"""Unmerge a model exactly: its adapters come back, and every bit of its base."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightning_lora.errors import warn
from lightning_lora.layers import LayerAdapter
from lightning_lora.model.changed_since_merge import (
    is_as_merged,
    refuse_changed_since_merge,
)
from lightning_lora.model.changes.attach import (
    attach_adapters,
    reinitialise_if_base_changed,
    update_for_changed_weights,
)
from lightning_lora.model.changes.freeze import freeze
from lightning_lora.model.changes.off_layers import convert_to_layer, move_to_layer
from lightning_lora.model.changes.undone import undone_on_error
from lightning_lora.model.merge import merge
from lightning_lora.model.records import forget_record, keep_record, state_of
from lightning_lora.model.start_call import record_of, start_call
from lightning_lora.model.view import View
from lightning_lora.model.views.tensors_view import MergedWeight
from lightning_lora.tensors.names import join, set_tensor
from lightning_lora.tensors.undo import Undo
from lightning_lora.tensors.values import (
    put_back,
    replace_values,
    set_aside,
    set_requires_grad,
)


def unmerge_adapters(model: nn.Module) -> None:
    """Undo a merge: restore the adapters and the exact base.

    Every bit of the base is restored, on the model's current device. If the model was
    converted to another dtype since the merge, the base is converted too.

    Args:
        model: A model that was merged by ``merge_adapters``, or by a Trainer with a
            ``LoRACallback``. An adapted model that is not merged does not change.

    Raises:
        AdapterStateError: ``model`` has no adapters, or its merged weights have
            changed.
    """
    start_call(model, "unmerge_adapters")
    _unmerge(View(model))


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Unmerge a model inside a ``with`` block.

    At the end it is merged again, if it was merged before.
    """
    was_merged = record_of(model).state.is_merged
    _unmerge(View(model))
    try:
        yield
    finally:
        if was_merged:
            merge(model)


def unmerge_or_forget(model: nn.Module, undo: ExitStack) -> bool:
    """Undo a merge, if there was one. Return whether this has put adapters back on their layers.

    Weights that were replaced since the merge are a new base: then the adapters are
    forgotten, with a warning. ``undo`` gets the step that takes back what was done.
    """
    if not state_of(model).is_merged:
        return False
    record = record_of(model, "unmerge_adapters")
    if forget_replaced_merge(model):
        undo.callback(keep_record, model, record)
        return False
    _take_updates_out(View(model))
    undo.callback(merge, model)
    return True


def forget_replaced_merge(model: nn.Module) -> bool:
    """Forget the adapters of a merged model, if its weights were replaced since the merge, and warn of that.

    Return whether they were. An adapted model stays as it is.
    """
    view = View(model)
    if is_as_merged(view):
        return False
    # before the change, because with warnings as errors this raises one
    warn(
        f"The weights of {view.title} were replaced after its adapters were merged "
        "into them: they are taken as a new base, and the adapters of the earlier "
        "fine-tune are dropped."
    )
    forget_record(model)
    return True


def _unmerge(view: View) -> None:
    """Undo a merge, if there was one."""
    if view.is_merged:
        refuse_changed_since_merge(view)
        _take_updates_out(view)


def _take_updates_out(view: View) -> None:
    """Undo a merge that nothing has changed since. After an error, the model is merged as before."""
    record = view.record
    adapters = record.merged_layer_adapters
    with (
        undone_on_error(view),
        torch.inference_mode(False),
        torch.no_grad(),
        Undo() as undo,
    ):
        for layer, adapter in adapters.items():
            _move_to_layer(view, layer, adapter, undo)
        for merged in view.merged_weights:
            _write_base(view, merged, undo)
        # what the user has frozen in the plain model is read before freeze sets flags
        record.note_unmerged(view.parameters)
        attach_adapters(view, adapters)
        update_for_changed_weights(view)
        freeze(view)
        # a base that was converted since the merge has other values
        reinitialise_if_base_changed(view)
        undo.keep()


def _move_to_layer(view: View, layer: str, adapter: LayerAdapter, undo: Undo) -> None:
    """Give a merged adapter the device of its layer, and its dtype if that was converted since the merge."""
    name = join(layer, adapter.weights[0])
    at_merge = view.record.base.after_merge.weights[name]
    is_converted = view.parameters[name].dtype != at_merge.seen.dtype
    if is_converted:
        convert_to_layer(view.modules[layer], adapter, undo)
    else:
        move_to_layer(view.modules[layer], adapter, undo)


def _write_base(view: View, merged: MergedWeight, undo: Undo) -> None:
    """Give a layer's weight the base's values again, on its current device and in its current dtype."""
    was_tied_to = merged.tied_parameter
    if was_tied_to is not None:
        _tie_again(view.modules[merged.layer], merged, was_tied_to, undo)
        return
    parameter, base = merged.parameter, merged.base_value
    undo.callback(put_back, parameter, set_aside(parameter), parameter.device)
    replace_values(parameter, base.to(parameter))
    view.record.base.readings.note_copied(merged.name, base, parameter)


def _tie_again(
    module: nn.Module, merged: MergedWeight, tied: nn.Parameter, undo: Undo
) -> None:
    """Give a layer the parameter back that it shared with others, with the merged parameter's ``requires_grad``."""
    undo.callback(set_tensor, module, merged.weight, merged.parameter)
    undo.callback(replace_values, tied, tied.data)
    # if all layers that shared the parameter are merged, no module held it: so a move of
    # the model did not move it
    replace_values(tied, tied.data.to(merged.parameter))
    set_requires_grad(tied, merged.parameter.requires_grad)
    set_tensor(module, merged.weight, tied)

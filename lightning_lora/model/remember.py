"""Set, find and delete the record of a model."""

import gc

from torch import nn

from lightning_lora.errors import AdapterStateError, listed
from lightning_lora.layers import LoRALayer
from lightning_lora.model.handover import leave, recall
from lightning_lora.model.loading import before_load
from lightning_lora.model.record import ATTRIBUTE, Record, find_record, inner_records
from lightning_lora.model.view import View
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import join, named_modules, plain_module, submodule
from lightning_lora.tensors.shards import reshard


def keep_record(model: nn.Module, record: Record) -> None:
    """Set the record of ``model``."""
    model = plain_module(model)
    forget_record(model)
    model._register_load_state_dict_pre_hook(before_load, with_module=True)
    vars(model)[ATTRIBUTE] = record


def forget_record(model: nn.Module) -> None:
    """Delete the record of ``model``, if it has one."""
    model = plain_module(model)
    vars(model).pop(ATTRIBUTE, None)
    hooks = model._load_state_dict_pre_hooks  # found without handles: a copy has the hooks, but no handles
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is before_load]:
        del hooks[key]


def recall_record(model: nn.Module) -> Record | None:
    """Set the record that a fit in another process stored.

    There must be a stored record for exactly this model's weights. Otherwise it returns None.
    """
    record = recall(model)
    if record is not None:
        keep_record(model, record)
    return record


def leave_record(model: nn.Module) -> None:
    """Leave the record of a merged model for another process.

    That process finds it by the merged weights.
    """
    view = view_of(model)
    leave(view.record, {name: digest(view.parameters[name]) for name in view.record.merged_weights})


def record_of(model: nn.Module) -> Record:
    """Return the record of ``model``.

    If FSDP2 shows whole weights after an evaluation, it takes them back first: what the caller reads and writes are the
    model's own.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are disabled now.
    """
    reshard(model)
    record = find_record(model) or recall_record(model)
    if record is None:
        raise AdapterStateError(f"{_title(model)} has no adapters{_instead(model)}")
    if record.disabled:
        raise AdapterStateError(
            f"The adapters of {_title(model)} are disabled. Do this after the block of disable_adapters. (A "
            "copy that was made inside the block stays disabled: copy the model outside.)"
        )
    return record


def _title(model: nn.Module) -> str:
    return type(plain_module(model)).__name__


def _instead(model: nn.Module) -> str:
    """Where the adapters of a model without a record are: in a part of it, or kept by a module around it."""
    inner = next(iter(inner_records(model)), None)
    if inner:
        return f". They are in its {inner!r}: pass that module."
    for each in gc.get_objects():  # a part does not know what is around it
        if issubclass(type(each), nn.Module) and (record := vars(each).get(ATTRIBUTE)) is not None:
            names = (name for name, module in named_modules(each).items() if module is plain_module(model))
            name = next(names, None)
            if name and any(f"{layer}.".startswith(f"{name}.") for layer in record.layers):
                around = f"{type(each).__name__}, in which it is {name!r}"
                return f" of its own. {around}, keeps them: pass that module. (After a fit, trainer.lightning_module.)"
    return ". Call inject_adapters and train it, or load_adapter."


def view_of(model: nn.Module) -> View:
    """Return a :class:`View` of an adapted model.

    Raises:
        AdapterStateError: ``model`` has no adapters, or they are disabled now, or some are no longer on their layers.
    """
    record, view = record_of(model), View(model)
    lost = [name for name in record.layers if name in view.modules and not _is_adapted(view, name)]
    if lost:
        raise AdapterStateError(
            f"{listed(lost)} of {_title(model)} no longer have their adapters: the layers were replaced, or "
            "merged by a call on another module that shares them. Call unmerge_adapters on that module, or "
            "inject_adapters(model, config) to give the layers new adapters."
        )
    return view


def _is_adapted(view: View, name: str) -> bool:
    return isinstance(view.modules[name], LoRALayer) or name in view.record.merged


def absorb_inner_records(model: nn.Module, record: Record) -> None:
    """Move the records of modules inside ``model`` into ``record``.

    Values that ``record`` already has are kept. A merged module is itself a base now, so its earlier values are not
    taken over.
    """
    for prefix, inner in inner_records(model).items():
        for name, flag in inner.requires_grad.items():
            record.requires_grad.setdefault(join(prefix, name), flag)
        if not inner.is_merged:
            record.is_trained |= inner.is_trained
            for name, value in inner.originals.items():
                record.originals.setdefault(join(prefix, name), value)
            for name, digests in inner.changed.items():
                record.changed.setdefault(join(prefix, name), digests)
        forget_record(submodule(model, prefix))

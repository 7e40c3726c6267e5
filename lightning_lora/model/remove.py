"""Remove adapters from a model: all of them, or one of several."""

from torch import nn

from lightning_lora.base.record import Record
from lightning_lora.model.base_values import restore_originals, tensors_with_originals
from lightning_lora.model.changed_since_adapted import refuse_computed_weights
from lightning_lora.model.changes.attach import detach_adapters
from lightning_lora.model.changes.freeze import unfreeze
from lightning_lora.model.changes.undone import undone_on_error
from lightning_lora.model.records import absorb_inner_records, forget_record
from lightning_lora.model.start_call import record_of
from lightning_lora.model.switch import activate, check_known, switch_to
from lightning_lora.model.view import View, view_of
from lightning_lora.tensors.undo import Undo


def remove_adapters(model: nn.Module, name: str | None = None) -> None:
    """Remove the adapters: ``model`` is a plain model again.

    It has its own classes and state dict keys, and the same parameters are trainable as
    before. If the updates are not merged, all values are the base's again. If they are
    merged, the updates stay in the weights. The biases and modules that were trained in
    full also keep their trained values then.

    Args:
        model: The model that ``inject_adapters`` was called on.
        name: Remove only the adapter of this name. If it is the active one, the others
            rest on, and the model shows its base until ``set_adapter``.

    Raises:
        AdapterStateError: ``model`` has no adapters, or none of this name; or the
            active one of several is merged.

    Example:
        >>> from lightning_lora import LoRAConfig, inject_adapters
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> names = inject_adapters(model, LoRAConfig(r=2))
        >>> remove_adapters(model)
        >>> model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )
    """
    record = record_of(model, "remove_adapters")
    check_known(record, name, model)
    if name is not None and record.inactive_adapters:
        _remove_one(model, record, name)
        return
    # if the base is shown, tensors first get back what the adapter has in them
    switch_to(model, record.adapter.name)
    view_of(model)  # refuses a model in which layers have lost their adapters
    # modules inside that were adapted on their own lose their adapters too. Their
    # originals are moved to ``record`` first, so that _restore_base writes them back
    absorb_inner_records(model, record)
    if not record.state.is_merged:
        _restore_base(model)
    forget_record(model)


def _remove_one(model: nn.Module, record: Record, name: str) -> None:
    """Remove one of several adapters. If it was the active one, the model shows its base then."""
    if name == record.adapter.name:
        # only an inactive adapter can be deleted: so another one becomes active
        with activate(model, next(iter(record.inactive_adapters))) as undo:
            switch_to(model, None)
            undo.keep()
    del record.inactive_adapters[name]


def _restore_base(model: nn.Module) -> None:
    """Take the adapters off, and give the base its values and what trained before."""
    view = View(model)
    refuse_computed_weights(view)
    with undone_on_error(view), Undo() as undo:
        restore_originals(view, tensors_with_originals(view), undo)
        unfreeze(view)
        undo.keep()
    # what could make this fail was refused above
    detach_adapters(view)

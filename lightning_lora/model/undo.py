"""Restore a model if a change to it fails."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

from lightning_lora.model.attach import detach_adapters
from lightning_lora.model.norms import FrozenNorm, unfreeze_norms
from lightning_lora.model.record import ATTRIBUTE, Record
from lightning_lora.model.remember import forget_record, keep_record
from lightning_lora.model.view import View
from lightning_lora.tensors.inplace import overlay
from lightning_lora.tensors.names import submodule
from lightning_lora.tensors.values import set_requires_grad


@contextmanager
def undone_on_error(before: View) -> Iterator[None]:
    """Restore a model's adapters and record after an error.

    If the code in the ``with`` block fails, adapters, records, frozen norms and ``requires_grad`` are as before.

    Args:
        before: A view of the model, made before the block.
    """
    model = before.model
    flags = {p: p.requires_grad for p in before.parameters.values()}
    layers = set(before.layers)
    norms = [module for module in before.modules.values() if isinstance(module, FrozenNorm)]
    records = {}
    for name, known in records_in(before).items():
        records[name] = record = copy(known)
        record.requires_grad, record.originals = dict(record.requires_grad), dict(record.originals)
        record.changed = dict(record.changed)
    try:
        yield
    except BaseException:
        now = View(model)
        detach_adapters(now, now.layers.keys() - layers)
        unfreeze_norms(now.modules.values(), but=norms)
        for norm in norms:
            if not isinstance(norm, FrozenNorm):
                overlay(norm, FrozenNorm)
        for p, flag in flags.items():
            set_requires_grad(p, flag)
        forget_record(model)
        for name, record in records.items():
            keep_record(submodule(model, name), record)
        raise


def records_in(view: View) -> dict[str, Record]:
    """The records of a model and its modules, by name."""
    found: dict[str, Record] = {}
    for name, module in view.modules.items():
        record = vars(module).get(ATTRIBUTE)
        if record is not None and not any(record is other for other in found.values()):
            found[name] = record
    return found

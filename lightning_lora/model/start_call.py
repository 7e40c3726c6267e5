"""The start of a call on a model: from which states it may start, and what is said of others.

A call begins with one of three functions:

- ``start_call``, if the model may be plain.
- ``record_of``, if it must have adapters.
- ``view_of`` (``view.py``), if it must have all its adapters, and the call looks at them.
"""

from torch import nn

from lightning_lora.base.blocks import refuse_in_block
from lightning_lora.base.record import Record
from lightning_lora.base.states import CALLS, USE, State, refusal
from lightning_lora.errors import AdapterStateError
from lightning_lora.model.records import find_record, inner_records, state_of
from lightning_lora.tensors.names import plain_module
from lightning_lora.tensors.shards import reshard


def start_call(model: nn.Module, call: str) -> Record | None:
    """Start a call on ``model``, which :data:`.CALLS` names: return the model's record, None if it is plain.

    A call that may not start now is refused.
    """
    rule = CALLS[call]
    if not rule.in_block:
        refuse_in_block(model, call)
    # after an evaluation, FSDP2 may show full weights. All calls need the model's own
    # parameters in their place
    reshard(model)
    if state_of(model) not in rule.states:
        raise refusal_to_start(model, call)
    return find_record(model)


def refusal_to_start(model: nn.Module, call: str) -> AdapterStateError:
    """Return the error for a call that may not start in the state of ``model``."""
    record = find_record(model)
    title = type(plain_module(model)).__name__
    if record is not None:
        about = refusal(call, record.state, title, record.adapter.name)
        return AdapterStateError(about)
    adapted_inside = list(inner_records(model))
    if adapted_inside:
        return AdapterStateError(
            f"{title} has no adapters. They are in its {adapted_inside[0]!r}: pass "
            "that module."
        )
    return AdapterStateError(refusal(call, State.PLAIN, title, adapter=""))


def record_of(model: nn.Module, call: str = USE) -> Record:
    """Start a call that needs adapters, and return the record of ``model``."""
    record = start_call(model, call)
    assert record is not None  # such a call may not start from State.PLAIN
    return record

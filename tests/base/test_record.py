"""A record goes from state to state, and keeps what a merge has left until it is undone."""

import pytest
import torch
from torch import nn

from lightning_lora.base.adapter_state import AdapterState
from lightning_lora.base.after_merge import AfterMerge
from lightning_lora.base.record import Record
from lightning_lora.base.states import State
from lightning_lora.config import LoRAConfig


def merged() -> Record:
    record = Record(AdapterState(LoRAConfig()))
    record.note_merged({}, AfterMerge())
    return record


def test_what_trained_while_merged_is_noted_when_the_updates_are_out_again() -> None:
    record = merged()
    weight = nn.Parameter(torch.ones(2))
    record.base.user_trains["weight"] = False
    record.note_unmerged({"weight": weight})
    assert record.state is State.ADAPTED
    assert record.base.user_trains == {"weight": True}


def test_a_block_that_shows_the_base_ends_in_the_state_before_it() -> None:
    record = merged()
    record.note_base_shown()
    assert record.state is State.MERGED_BASE_SHOWN
    assert record.name_in_effect is None
    record.note_adapter_shown()
    assert record.state is State.MERGED
    assert record.name_in_effect == "default"


def test_updates_are_not_taken_out_twice() -> None:
    record = merged()
    record.note_unmerged({})
    with pytest.raises(AssertionError):
        record.note_unmerged({})

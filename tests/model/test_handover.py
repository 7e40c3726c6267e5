"""What a fit elsewhere remembers is found by its weights."""

import copy
from pathlib import Path

import pytest
import torch

from lightning_lora import (
    AdapterStateError,
    LoRAConfig,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from lightning_lora.model.remember import forget_record, leave_record
from tests.models import LitTiny, is_plain, randomise, same, state


@pytest.fixture
def sent_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LitTiny, LitTiny]:
    """A module as it was adapted in another process, and a plain one with nothing but the merged weights."""
    monkeypatch.setenv("LIGHTNING_LORA_MEMORY", str(tmp_path / "memory"))
    there = LitTiny()
    inject_adapters(there, LoRAConfig(r=2, modules_to_save=["head"]))
    randomise(there)
    adapted = copy.deepcopy(there)
    merge_adapters(there)
    leave_record(there)
    forget_record(there)
    return adapted, there


def test_calls_find_what_was_left(sent_home: tuple[LitTiny, LitTiny]) -> None:
    adapted, home = sent_home
    assert is_plain(home)
    unmerge_adapters(home)
    assert same(state(home), state(adapted))


def test_a_new_base_is_one_once_its_memory_is_removed(sent_home: tuple[LitTiny, LitTiny]) -> None:
    _, home = sent_home
    weights = state(home)
    remove_adapters(home)
    assert same(state(home), weights)
    with pytest.raises(AdapterStateError, match="has no adapters"):
        unmerge_adapters(home)


def test_other_weights_remember_nothing(sent_home: tuple[LitTiny, LitTiny]) -> None:
    _, home = sent_home
    with torch.no_grad():
        home.q_proj.weight.add_(1)
    with pytest.raises(AdapterStateError, match="has no adapters"):
        unmerge_adapters(home)

"""The base's tensors are read once, and again when they change."""

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig
from lightning_lora.model.state import AdapterState, Record
from lightning_lora.tensors import digests as hashing
from lightning_lora.tensors.digests import digest


class Reads:
    """Counts the integers that digests read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, own = 0, hashing._digest_of_integers

        def counting(integers: Tensor) -> int:
            self.count += integers.numel()
            return own(integers)

        monkeypatch.setattr(hashing, "_digest_of_integers", counting)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_a_weight_is_read_once_and_again_when_it_changes(reads: Reads) -> None:
    record, weight = Record(AdapterState(LoRAConfig())), nn.Parameter(torch.randn(100, 100))
    first = record.digests({"weight": weight})["weight"]
    once = reads.count
    assert record.digests({"weight": weight})["weight"] == first and reads.count - once < 3000
    with torch.no_grad():
        weight[0, 1] += 1  # between two samples, but torch counts it
    assert record.digests({"weight": weight})["weight"] == digest(weight) != first
    before = reads.count
    record.digests({"weight": weight}, anew=True)["weight"]
    assert reads.count - before >= 10_000


def test_a_write_that_torch_does_not_count_is_seen_in_the_samples_or_when_read_anew() -> None:
    record, weight = Record(AdapterState(LoRAConfig())), nn.Parameter(torch.randn(100, 100))
    first = record.digests({"weight": weight})["weight"]
    weight.data.mul_(2)
    second = record.digests({"weight": weight})["weight"]
    assert second != first
    weight.data[0, 1] += 1  # between two samples: this is what escapes
    assert record.digests({"weight": weight})["weight"] == second
    assert record.digests({"weight": weight}, anew=True)["weight"] == digest(weight) != second


@pytest.mark.parametrize("change", ["changed before", "converted"])
def test_a_digest_is_not_handed_to_a_copy_with_other_values(change: str) -> None:
    record, weight = Record(AdapterState(LoRAConfig())), torch.randn(100, 100)
    record.digests({"weight": weight})["weight"]
    if change == "changed before":
        weight[0, 1] += 1
    copy = weight.double() if change == "converted" else weight.clone()
    record.base_was_copied("weight", weight, copy)
    assert record.digests({"weight": copy})["weight"] == digest(copy)


def test_a_copy_may_be_handed_a_known_digest(reads: Reads) -> None:
    record, weight = Record(AdapterState(LoRAConfig())), torch.randn(100, 100)
    first = record.digests({"weight": weight})["weight"]
    other, before = weight.clone(), reads.count
    record.base_was_copied("weight", weight, other)
    assert record.digests({"weight": other})["weight"] == first and reads.count - before < 10_000

"""Digests tell contents apart, and known ones are read once."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.tensors import values
from lightning_lora.tensors.values import Seen, digest, hand_on_digest, known_digest


class Reads:
    """Counts the integers that digests read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, own = 0, values._digest_of_integers

        def counting(integers: Tensor) -> int:
            self.count += integers.numel()
            return own(integers)

        monkeypatch.setattr(values, "_digest_of_integers", counting)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def test_digest_is_the_sum_of_its_definition() -> None:
    integers = torch.randint(-(2**31), 2**31, (2 * values._CHUNK + 3,), dtype=torch.int32)
    multipliers = values._multipliers(integers.device).tolist()
    total = len(integers)
    for place, chunk in enumerate(integers.split(values._CHUNK)):
        products = [x * m for x, m in zip(chunk.tolist(), multipliers, strict=False)]
        total += sum(products) * multipliers[-1 - place]
    assert digest(integers) == total % (1 << 63)


def test_known_digest_reads_a_weight_once_and_again_when_it_changes(reads: Reads) -> None:
    weight = nn.Parameter(torch.randn(100, 100))
    first = known_digest(weight)
    once = reads.count
    assert known_digest(weight) == first and reads.count - once < 3000
    with torch.no_grad():
        weight[0, 0] += 1
    assert known_digest(weight) == digest(weight) != first
    known_digest(weight)
    before = reads.count
    known_digest(weight, anew=True)
    assert reads.count - before >= 10_000


def test_a_write_that_torch_does_not_count_is_seen_in_the_samples_or_when_read_anew() -> None:
    weight = nn.Parameter(torch.randn(100, 100))
    first = known_digest(weight)
    weight.data.mul_(2)
    assert known_digest(weight) != first
    second = known_digest(weight)
    weight.data[0, 1] += 1  # between two samples: this is what escapes
    assert known_digest(weight) == second and known_digest(weight, anew=True) == digest(weight) != second


def test_a_copy_may_be_handed_a_known_digest(reads: Reads) -> None:
    weight = torch.randn(100, 100)
    known_digest(weight)
    other, before = weight.clone(), reads.count
    hand_on_digest(weight, other)
    assert known_digest(other) == digest(weight) and reads.count - before < 10_000 + 3000


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_what_was_seen_of_a_weight_holds_for_its_copies(copied: object) -> None:
    weight = torch.randn(50, 50)
    other, seen = copied((weight, Seen(weight)))  # type: ignore[operator]
    assert seen.is_still(other) and seen.is_alike(other)
    other[3, 7] += 1
    assert not seen.is_still(other)


def test_a_weight_that_moved_is_still_the_same() -> None:
    weight = nn.Parameter(torch.randn(50, 50))
    seen = Seen(weight)
    weight.data = weight.data.clone()
    assert seen.is_still(weight)
    weight.data = weight.data.clone().mul_(2)
    assert not seen.is_still(weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_any_flipped_bit_and_any_moved_row_is_another_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 9).to(dtype)
    seen, content = {digest(tensor)}, tensor.view(torch.uint8)
    for place in range(len(content)):
        for bit in range(8):
            content[place] ^= 1 << bit
            seen.add(digest(tensor))
            content[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(content)
    assert digest(-tensor) not in seen
    a, b = torch.tensor([1, 2]).to(dtype), torch.tensor([3, 4]).to(dtype)
    assert digest(torch.stack([a, b, b, a])) != digest(torch.stack([b, a, a, b]))
    a, b = a.repeat(1 << 17), b.repeat(1 << 17)
    assert digest(torch.stack([a, b, b, a])) != digest(torch.stack([b, a, a, b]))

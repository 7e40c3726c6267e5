"""Digests tell contents apart, and known ones are read once."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_lora.tensors import digests, values
from lightning_lora.tensors import seen as seen_module
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.seen import Seen


# so those of large tensors in earlier files hold
def test_digest_is_the_sum_of_its_definition() -> None:
    integers = torch.randint(
        -(2**31), 2**31, (2 * digests._CHUNK + 3,), dtype=torch.int32
    )
    multipliers = digests._multipliers(integers.device).tolist()
    total = len(integers)
    for place, chunk in enumerate(integers.split(digests._CHUNK)):
        products = [
            x * factor for x, factor in zip(chunk.tolist(), multipliers, strict=False)
        ]
        total += sum(products) * multipliers[-1 - place]
    assert digest(integers) == total % (1 << 63)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_flipped_bit_is_another_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 9).to(dtype)
    seen = {digest(tensor)}
    content = tensor.view(torch.uint8)
    for place, bit in itertools.product(range(len(content)), range(8)):
        content[place] ^= 1 << bit
        seen.add(digest(tensor))
        content[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(content)
    assert digest(-tensor) not in seen


def test_a_weight_that_was_moved_to_another_device_and_written_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = nn.Parameter(torch.randn(100, 100))
    look = seen_module.look
    seen = Seen(weight)

    def elsewhere(tensor: Tensor) -> Any:
        return replace(look(tensor), device="elsewhere")  # type: ignore[type-var]

    monkeypatch.setattr(seen_module, "look", elsewhere)
    weight.data = weight.data.clone()
    other, copied = copy.deepcopy((weight, seen))
    with torch.no_grad():
        assert seen.has_same_values(weight)
        assert copied.has_same_values(other)
        weight[0, 1] += 1
        other[0, 1] += 1
    assert not seen.has_same_values(weight)
    assert not copied.has_same_values(other)


def test_a_weight_in_other_memory_of_its_device_has_changed_even_if_its_samples_are_the_same() -> (
    None
):
    weight = nn.Parameter(torch.randn(100, 100))
    seen = Seen(weight)
    written = weight.detach().clone()
    written[0, 1] += 1  # between two samples
    weight.data = written
    assert not seen.has_same_values(weight)


def test_a_look_sees_some_values_of_every_column() -> None:
    columns = 8
    rows = 896  # so that every eighth value would be looked at: those of one column
    for column in range(columns):
        weight = torch.zeros(rows, columns)
        seen = Seen(weight)
        weight.data[:, column] = 1  # changes no version
        assert not seen.is_unchanged(weight)


@pytest.mark.parametrize("times", [1, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_any_moved_row_is_another_digest(dtype: torch.dtype, times: int) -> None:
    a = torch.tensor([1, 2]).to(dtype).repeat(times)
    b = torch.tensor([3, 4]).to(dtype).repeat(times)
    one = torch.stack([a, b, b, a])
    other = torch.stack([b, a, a, b])
    assert digest(one) != digest(other)


def test_what_is_set_aside_of_a_larger_memory_is_a_copy() -> None:
    memory = torch.zeros(8)
    part = nn.Parameter(memory[2:6])
    aside = values.set_aside(part)
    memory.fill_(1)
    assert part.all()
    assert not aside.any()


def test_a_whole_tensor_is_set_aside_without_a_copy() -> None:
    whole = nn.Parameter(torch.zeros(8))
    assert values.set_aside(whole).data_ptr() == whole.data_ptr()


def test_a_tensor_made_in_inference_mode_takes_other_values_and_is_used_there() -> None:
    with torch.inference_mode():
        tensor = torch.zeros(2)
    values.replace_values(tensor, torch.ones(2))
    with torch.inference_mode():
        assert (tensor + tensor[:1]).tolist() == [2.0, 2.0]


def test_a_look_at_fake_tensors_leaves_digests_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(digests, "_MULTIPLIERS", {})
    tensor = torch.arange(8)
    with FakeTensorMode():
        digests._multipliers(tensor.device)
    assert digest(tensor) == digest(tensor.clone())


def test_what_has_been_read_in_full_is_compared_in_full() -> None:
    weight = torch.zeros(100, 100)
    seen = Seen(weight)
    seen.digest()
    other = weight.clone()
    other[0, 1] = 1  # between two samples
    assert not seen.may_have_same_values(other)


def test_tensors_without_values_are_like_each_other_alone() -> None:
    absent = torch.empty(2, device="meta")
    present = torch.zeros(2)
    assert values.same_bits(absent, absent)
    assert not values.same_bits(absent, present)
    assert not values.same_bits(present, absent)


@pytest.mark.parametrize(
    ("value", "is_computable"),
    [
        (torch.ones(2), True),
        (torch.ones(2, dtype=torch.int8), True),
        (torch.ones(2, dtype=torch.bool), True),
        (torch.ones(2).to(torch.float8_e4m3fn), False),
        (torch.ones(2).to_sparse(), False),
        ([1.0, 1.0], False),
    ],
)
def test_torch_computes_with_all_but_sparse_tensors_and_those_in_float8(
    value: Any, is_computable: bool
) -> None:
    assert values.is_computable(value) == is_computable

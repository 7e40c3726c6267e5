"""Rows of a slice: where two meet, where a layer ends; and weights of one byte."""

import pytest
import torch
from torch import nn

from lightning_lora import ConfigError, LoRAConfig, TargetError, inject_adapters, remove_adapters
from tests.models import randomise

Rows = dict[str, list[int]]


def sliced(rows: Rows) -> LoRAConfig:
    return LoRAConfig(r=1, target_modules=["proj"], target_slices={"proj": rows})


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"proj": nn.Linear(3, 6, dtype=torch.float64)})


def changed_rows(rows: Rows) -> list[int]:
    """Which features of a layer of six an update of these rows changes."""
    built, x = model(), torch.randn(5, 3, dtype=torch.float64)
    before = built["proj"](x)
    inject_adapters(built, sliced(rows))
    randomise(built, scale=1)
    return (built["proj"](x) != before).any(dim=0).nonzero().flatten().tolist()


@pytest.mark.parametrize("rows", [{"a": [1, 3], "b": [3, 5]}, {"a": [3, 5], "b": [1, 3]}], ids=str)
def test_slices_may_touch(rows: Rows) -> None:
    assert changed_rows(rows) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "rows", [{"a": [1, 4], "b": [3, 5]}, {"a": [3, 5], "b": [1, 4]}, {"a": [0, 6], "b": [2, 3]}], ids=str
)
def test_slices_that_share_one_row_are_refused(rows: Rows) -> None:
    with pytest.raises(ConfigError, match="rows in two parts"):
        sliced(rows)


def test_a_slice_may_be_one_row_and_may_not_be_none() -> None:
    assert changed_rows({"a": [3, 4]}) == [3]
    with pytest.raises(ConfigError, match="no range of rows"):
        sliced({"a": [3, 3]})


@pytest.mark.parametrize("rows", [{"a": [0, 6]}, {"a": [0, 2], "b": [2, 6]}], ids=str)
def test_slices_may_be_all_rows(rows: Rows) -> None:
    assert changed_rows(rows) == list(range(6))


def test_a_slice_of_one_row_too_many_is_refused_and_changes_nothing() -> None:
    built = model()
    with pytest.raises(TargetError, match="'proj' end beyond its 6 rows: 'b'"):
        inject_adapters(built, sliced({"a": [0, 2], "b": [2, 7]}))
    assert type(built["proj"]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_layer_of_one_byte_numbers_is_refused_by_its_dtype(dtype: torch.dtype) -> None:
    built = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    built[1].weight = nn.Parameter(built[1].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(TargetError, match=f"'1': its weight is {dtype}"):
        inject_adapters(built, LoRAConfig(r=1))
    assert [type(layer) for layer in built] == [nn.Linear, nn.Linear]
    assert inject_adapters(built, LoRAConfig(r=1, exclude_modules=["1"])) == ("0",)
    remove_adapters(built)

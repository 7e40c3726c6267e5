"""Values that were drawn by an initialisation are told from those that were trained."""

import pytest
import torch
from torch import Tensor

from lightning_lora.functional.drawn import block_of, is_normal, is_uniform

SHAPE = (120, 90)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def uniform(bound: float = 0.1) -> Tensor:
    return torch.empty(SHAPE).uniform_(-bound, bound)


def normal(deviation: float = 0.02) -> Tensor:
    return torch.empty(SHAPE).normal_(0, deviation)


@pytest.mark.parametrize("seed", range(5))
def test_each_distribution_is_known_and_not_the_other(seed: int) -> None:
    torch.manual_seed(seed)
    assert is_uniform(uniform(), 0.1)
    assert is_normal(normal(), 0.02)
    assert not is_uniform(normal(), 0.1)
    assert not is_normal(uniform(), 0.1 / 3**0.5)


def test_rounding_to_bfloat16_changes_nothing() -> None:
    assert is_uniform(uniform().bfloat16().float(), 0.1)
    assert is_normal(normal().bfloat16().float(), 0.02)


@pytest.mark.parametrize("scale", [0.95, 1.05])
def test_another_bound_or_deviation_is_not_this_one(scale: float) -> None:
    assert not is_uniform(scale * uniform(), 0.1)
    assert not is_normal(scale * normal(), 0.02)


def test_values_beside_zero_are_not_drawn_around_it() -> None:
    assert not is_uniform(uniform() + 0.006, 0.1)
    assert not is_normal(normal() + 0.002, 0.02)


@pytest.mark.parametrize("dim", [0, 1], ids=["a row", "a column"])
def test_a_larger_row_or_column_was_trained(dim: int) -> None:
    scale = torch.ones(SHAPE)
    scale.select(dim, 3).fill_(1.6)
    weight = normal() * scale
    weight *= 0.02 / weight.std()
    assert not is_normal(weight, 0.02)


def test_one_row_or_column_is_judged_by_its_values_alone() -> None:
    assert is_normal(normal().reshape(1, -1), 0.02)
    assert is_normal(normal().reshape(-1, 1), 0.02)


def test_no_value_is_none_of_them() -> None:
    weight = normal()
    weight[0, 0] = torch.nan
    assert not is_uniform(weight, 0.1)
    assert not is_normal(weight, 0.02)


@pytest.mark.parametrize(
    "shape", [(30, 20), (4000, 5), (3, 50_000), (2000, 2000), (8, 4, 3, 3)], ids=str
)
def test_a_block_has_about_ten_thousand_values_of_all_parts(
    shape: tuple[int, ...],
) -> None:
    weight = torch.arange(
        1.0, 1 + torch.Size(shape).numel(), dtype=torch.float64
    ).reshape(shape)
    block = block_of(weight)
    assert block.dtype == torch.float32
    assert min(weight.numel(), 9_000) <= block.numel() <= 10_000
    assert block[0, 0] == weight.flatten()[0]
    last_row = weight.flatten(1)[-1]
    is_near_the_end = block[-1, -1] >= 0.97 * last_row[-1]
    assert is_near_the_end


def test_a_block_has_no_rows_of_zeros() -> None:
    weight = torch.ones(6, 4)
    weight[2] = 0
    assert torch.equal(block_of(weight), torch.ones(5, 4))

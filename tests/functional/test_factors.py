"""Factors of several updates, put together: their product is the sum, difference or best approximation."""

import pytest
import torch
from torch import Tensor

from lightning_lora.functional.factors import (
    Factors,
    concatenated,
    difference,
    joined_rows,
    truncated,
    with_rank,
)

IN, OUT = 6, 5


def factors(r: int, out: int = OUT, dtype: torch.dtype = torch.float64) -> Factors:
    a = torch.randn(r, IN, dtype=torch.float64)
    b = torch.randn(out, r, dtype=torch.float64)
    return a.to(dtype), b.to(dtype)


def product(update: Factors) -> Tensor:
    a, b = update
    return b @ a


def test_a_weighted_sum_is_exact() -> None:
    one, other = factors(2), factors(3)
    a, b = concatenated([one, other], [0.5, -2.0])
    assert (a.shape, b.shape) == ((5, IN), (OUT, 5))
    torch.testing.assert_close(b @ a, 0.5 * product(one) - 2 * product(other))


def test_each_update_of_a_sum_has_its_weight() -> None:
    with pytest.raises(ValueError, match="shorter"):
        concatenated([factors(2), factors(2)], [1.0])


def test_a_difference_has_twice_the_rank() -> None:
    one, other = factors(2), factors(2)
    a, b = difference(one, other)
    assert len(a) == 4
    torch.testing.assert_close(b @ a, product(one) - product(other))


def test_a_small_difference_of_large_products_is_not_rounded_away() -> None:
    a, b = factors(2, dtype=torch.float32)
    a0, b0 = 1000 * a, 1000 * b
    step = torch.full_like(a0, 0.25)
    exact = b0.double() @ step.double()
    computed = product(difference((a0 + step, b0), (a0, b0)))
    torch.testing.assert_close(computed.double(), exact, rtol=1e-5, atol=0)


def test_updates_of_some_rows_become_one_of_all() -> None:
    top, bottom = factors(2, out=1), factors(3, out=2)
    a, b = joined_rows([top, bottom], [0, 3], rows=OUT)
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    expected[0:1] = product(top)
    expected[3:5] = product(bottom)
    assert (a.shape, b.shape) == ((5, IN), (OUT, 5))
    torch.testing.assert_close(b @ a, expected)


def test_a_larger_rank_adds_zeros() -> None:
    update = factors(2)
    a, b = with_rank(update, 4)
    assert not a[2:].any()
    assert not b[:, 2:].any()
    assert torch.equal(b @ a, product(update))


def test_the_same_rank_is_the_same_update() -> None:
    update = factors(2, dtype=torch.bfloat16)
    a, b = with_rank(update, 2)
    assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
    assert torch.equal(a, update[0].float())
    assert torch.equal(b, update[1].float())


@pytest.mark.parametrize("r", [OUT, IN])
def test_the_largest_rank_of_a_matrix_holds_every_update(r: int) -> None:
    update = factors(9)
    a, b = with_rank(update, r)
    assert (a.shape, b.shape) == ((r, IN), (OUT, r))
    torch.testing.assert_close(b @ a, product(update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_approximation_is_that_of_the_singular_values(
    dtype: torch.dtype,
) -> None:
    update = factors(4, dtype=dtype)
    u, s, v = torch.linalg.svd(product(update).double())
    best = (u[:, :2] * s[:2]) @ v[:2]
    a, b = truncated(update, 2)
    assert (a.dtype, b.dtype) == (dtype, dtype)
    assert (a.shape, b.shape) == ((2, IN), (OUT, 2))
    torch.testing.assert_close((b @ a).double(), best, rtol=1e-5, atol=1e-5)
    # each factor has the root of a singular value
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_no_more_rank_than_is_needed() -> None:
    update = factors(2)
    a, b = truncated(update, 4)
    assert len(a) == 2
    torch.testing.assert_close(b @ a, product(update))

"""Combinations of updates are tested against the full products."""

import pytest
import torch
from torch import Tensor

from lightning_lora.functional.combine import Factors, concatenated, dare, factored, ties, truncated


def updates(stack: tuple[int, ...] = ()) -> list[Factors]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(*stack, r, 9, generator=generator), torch.randn(*stack, 6, r, generator=generator)) for r in (2, 3)
    ]


def weighted(found: list[Factors], weights: list[float]) -> Tensor:
    total: Tensor = sum(w * (b @ a) for (a, b), w in zip(found, weights, strict=True))  # type: ignore[assignment]
    return total


@pytest.mark.parametrize("stack", [(), (4,)])
def test_the_concatenation_is_the_sum(stack: tuple[int, ...]) -> None:
    a, b = concatenated(updates(stack), [0.7, -0.3])
    assert a.shape[-2] == 5
    torch.testing.assert_close(b @ a, weighted(updates(stack), [0.7, -0.3]))


@pytest.mark.parametrize("stack", [(), (4,)])
@pytest.mark.parametrize("r", [1, 2, 4, 5, 9])
def test_the_truncation_is_the_best_one(r: int, stack: tuple[int, ...]) -> None:
    whole = concatenated(updates(stack), [0.7, 0.3])
    a, b = truncated(whole, r)
    u, s, v = torch.linalg.svd(whole[1] @ whole[0], full_matrices=False)
    best = (u[..., :r] * s[..., :r].unsqueeze(-2)) @ v[..., :r, :]
    assert a.shape[-2] <= r
    torch.testing.assert_close(b @ a, best, rtol=1e-4, atol=1e-4)


def test_a_matrix_of_low_rank_is_factored_exactly() -> None:
    delta = weighted(updates(), [1.0, 1.0])
    a, b = factored(delta, 5)
    torch.testing.assert_close(b @ a, delta, rtol=1e-4, atol=1e-4)


def test_ties_keeps_the_largest_and_the_sign_of_most() -> None:
    one, other = torch.tensor([4.0, -3.0, 0.1, 2.0]), torch.tensor([-1.0, -5.0, 0.2, 3.0])
    assert ties([one, other], [1.0, 1.0], density=0.5).tolist() == [4.0, -4.0, 0.0, 3.0]
    assert ties([one, other], [1.0, 0.0], density=1.0).tolist() == pytest.approx(one.tolist())


def test_dare_keeps_the_expected_sum() -> None:
    one, other = torch.full((200, 200), 2.0), torch.full((200, 200), -1.0)
    total = dare([one, other], [0.5, 1.0], 0.25, torch.Generator().manual_seed(0))
    assert set(total.unique().tolist()) == {-4.0, 0.0, 4.0} and abs(total.mean()) < 0.05
    again = dare([one, other], [0.5, 1.0], 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(total, again)
    assert torch.equal(dare([one, other], [0.5, 1.0], 1.0, torch.Generator()), one * 0.5 + other)

"""Numbers about updates equal those of the full product."""

import pytest
import torch
from torch import Tensor

from lightning_lora.functional.subspace import cosine, effective_rank, singular_values, subspace_similarity


def factors(seed: int, r: int = 3, stack: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*stack, r, 7, generator=generator), torch.randn(*stack, 5, r, generator=generator)


@pytest.mark.parametrize("stack", [(), (4,)])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_singular_values_are_those_of_the_product(r: int, stack: tuple[int, ...]) -> None:
    a, b = factors(0, r, stack)
    expected = torch.linalg.svdvals(-2.0 * (b @ a).double())[..., : min(r, 5)]
    torch.testing.assert_close(singular_values(a, b, -2.0), expected, rtol=1e-5, atol=1e-5)


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.tensor([1.0, 1.0, 1.0, 1.0])) == pytest.approx(4)
    assert effective_rank(torch.tensor([1.0, 1e-9])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    half = effective_rank(torch.tensor([3.0, 1.0]))  # the entropy of 3/4 and 1/4
    assert half == pytest.approx(4 / 3**0.75)


@pytest.mark.parametrize("stack", [(), (4,)])
def test_cosine_is_that_of_the_products(stack: tuple[int, ...]) -> None:
    one, other = factors(0, 3, stack), factors(1, 2, stack)
    first, second = one[1] @ one[0], other[1] @ other[0]
    expected = torch.nn.functional.cosine_similarity(first.flatten(-2), second.flatten(-2), dim=-1)
    torch.testing.assert_close(cosine(one, other).float(), expected, rtol=1e-4, atol=1e-5)
    assert not cosine((one[0], 0 * one[1]), one).any()


def test_similarity_is_one_inside_and_zero_across() -> None:
    a, _ = factors(0)
    mixed = torch.randn(3, 3) @ a
    assert subspace_similarity(a, mixed) == pytest.approx(1)
    assert subspace_similarity(a[:1], a) == pytest.approx(1)
    identity = torch.eye(7)
    assert subspace_similarity(identity[:3], identity[3:]) == pytest.approx(0)
    assert subspace_similarity(identity[:2], identity[1:3]) == pytest.approx(0.5)

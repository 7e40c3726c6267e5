"""Directions of updates: those that an update has, and no others."""

from typing import Any

import pytest
import torch

from lightning_lora.functional.subspace import (
    directions,
    effective_rank,
    norm,
    subspace_similarity,
)

FACTORS = (torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]), torch.ones(2, 2))
MATRIX = torch.tensor([[1.0, 0.0, 2.0], [2.0, 0.0, 4.0]])


@pytest.mark.parametrize("update", [FACTORS, MATRIX], ids=["factors", "matrix"])
def test_directions_that_an_update_lacks_are_zeros(update: Any) -> None:
    one_of_two = torch.tensor([1.0, 0.0], dtype=torch.float64)
    u, sizes, v = directions(update)
    assert sizes[0] > 1
    torch.testing.assert_close(u.norm(dim=0), one_of_two)
    torch.testing.assert_close(v.norm(dim=0), one_of_two)


def test_directions_that_two_updates_lack_are_not_alike() -> None:
    found = subspace_similarity(MATRIX, MATRIX)
    torch.testing.assert_close(
        found, torch.tensor([[1.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    )


def test_the_effective_rank_is_the_number_of_equal_values() -> None:
    values = torch.tensor(
        [[2.0, 2.0, 2.0, 0.0], [3.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    torch.testing.assert_close(effective_rank(values), torch.tensor([3.0, 1.0, 0.0]))


def test_unequal_values_count_less() -> None:
    shares = torch.tensor([0.75, 0.25])
    entropy = -(shares * shares.log()).sum()
    torch.testing.assert_close(effective_rank(8 * shares), entropy.exp())


def test_the_norm_of_factors_is_that_of_their_product() -> None:
    a, b = torch.randn(3, 2, 5), torch.randn(3, 4, 2)
    of_product = torch.linalg.matrix_norm((b @ a).double())
    torch.testing.assert_close(norm((a, b)), of_product, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm(b @ a).double(), of_product, rtol=1e-5, atol=0)


def test_similarity_of_orthogonal_and_of_contained_directions() -> None:
    eye = torch.eye(4)
    top = torch.diag(torch.tensor([3.0, 2.0])) @ eye[:2]
    others = torch.diag(torch.tensor([3.0, 2.0])) @ eye[2:]
    assert not subspace_similarity(top, others).any()
    contained = subspace_similarity(top[:1], top)
    torch.testing.assert_close(contained, torch.ones(1, 2, dtype=torch.float64))

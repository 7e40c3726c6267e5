"""Directions of updates: those that an update has, and no others."""

from typing import Any

import pytest
import torch

from lightning_lora.functional.subspace import directions, subspace_similarity

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
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [1.0, 0.5]], dtype=torch.float64))

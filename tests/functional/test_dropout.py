"""Dropout draws the same positions again, and as many as it must."""

import pytest
import torch

from lightning_lora.functional import dropout


def test_gaps_are_drawn_until_the_end_is_reached(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # in place of the square root that adds a margin
    def drawing_half(expected: float) -> float:
        return -expected / 10

    monkeypatch.setattr("math.sqrt", drawing_half)
    places = dropout._by_gaps(10_000, 0.3, torch.Generator().manual_seed(0))
    assert (places.diff() > 0).all()
    assert places[0] >= 0
    assert places[-1] < 10_000
    last_quarter = (places >= 7_500).float().mean().item()
    assert last_quarter == pytest.approx(0.25, abs=0.03)
    assert len(places) / 10_000 == pytest.approx(0.3, abs=0.02)

"""Recomputed layers train whatever they are given beside what is to have a gradient."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.models import ADAPTERS, LitTiny, data, lora, same, state, trainer


class Gathers(LitTiny):
    """Its two projections are recomputed in backward, and read integers, flags and a number beside their input."""

    def __init__(self, *, recomputed: bool) -> None:
        super().__init__()
        self.recomputed = recomputed

    def inner(self, x: Tensor, order: Tensor, kept: Tensor, scale: float) -> Tensor:
        return scale * (torch.tanh(self.q_proj(x[:, order])) + self.v_proj(x.where(kept, 0)))

    def forward(self, index: Tensor) -> Tensor:
        inputs: tuple[Any, ...] = (self.embed(index), torch.arange(7, -1, -1), torch.arange(8) > 2, 0.5)
        return self.head(
            checkpoint(self.inner, *inputs, use_reentrant=True) if self.recomputed else self.inner(*inputs)
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_recomputed_layer_may_be_given_integers_and_trains_as_others_do(tmp_path: Path, dropout: float) -> None:
    states = []
    for recomputed in (False, True):
        model = Gathers(recomputed=recomputed)
        torch.manual_seed(0)
        trainer(tmp_path, [lora(merge=False, dropout=dropout)]).fit(model, data())
        states.append(state(model))
    assert same(*states) and all(states[1][name].any() for name in ADAPTERS)

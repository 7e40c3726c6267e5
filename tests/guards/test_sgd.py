"""With SGD, the learning rate that suits an adapter depends on its scaling, alpha / r."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_lora import LoRAConfig, inject_adapters
from tests.support.models import LitTiny, data, lora, trainer

LINE = "and the optimizer is SGD"


def loss_after_training(
    kind: type[Optimizer], *, r: int, alpha: float, rate: float, seed: int
) -> float:
    """The loss of a layer of 32 features that learns another layer's outputs, over that of its start."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 32))
    x = torch.randn(256, 32)
    y = nn.Linear(32, 32)(x).detach()
    inject_adapters(model, LoRAConfig(r=r, alpha=alpha, target_modules=["0"]))
    start = nn.functional.mse_loss(model(x), y).item()
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)  # type: ignore[call-arg]
    for rows in torch.randperm(256).repeat(25).split(32):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return nn.functional.mse_loss(model(x), y).item() / start


@pytest.mark.parametrize("seed", range(5))
def test_a_scaling_of_eight_diverges_at_a_rate_that_suits_one_of_one(seed: int) -> None:
    assert loss_after_training(SGD, r=1, alpha=1, rate=2, seed=seed) < 0.9
    assert loss_after_training(SGD, r=8, alpha=8, rate=2, seed=seed) < 0.9
    assert math.isnan(loss_after_training(SGD, r=1, alpha=8, rate=2, seed=seed))


@pytest.mark.parametrize("alpha", [1, 8])
def test_one_rate_of_adam_suits_both(alpha: float) -> None:
    assert loss_after_training(AdamW, r=1, alpha=alpha, rate=0.002, seed=0) < 1


CASES = [
    (SGD, 2, 8, True),
    (SGD, 4, 8, False),
    (SGD, 1, None, False),
    (AdamW, 1, 8, False),
]


@pytest.mark.parametrize(("kind", "r", "alpha", "is_named"), CASES)
def test_a_large_scaling_is_named_under_sgd(
    kind: type[Optimizer],
    r: int,
    alpha: float | None,
    is_named: bool,
    tmp_path: Path,
    caplog: Any,
) -> None:
    model = LitTiny()
    model.configure_optimizers = lambda: kind(model.parameters(), lr=0.01)  # type: ignore[method-assign, call-arg]
    trainer(tmp_path, [lora(r=r, alpha=alpha)], max_steps=1).fit(model, data())
    assert (LINE in caplog.text) == is_named
    assert (
        "'q_proj', 'v_proj' are scaled by alpha / r, which is 4 at most" in caplog.text
    ) == is_named

"""Which learning rates are low depends on the size of the model, and the advice with it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.guards.learning_rates import LearningRates
from lightning_lora.model.view import View

SMALL = 1_000
LARGE = 32_000  # a square matrix of so many features has more than 1e9 weights


def one_layer(features: int) -> nn.Module:
    """A layer without memory."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(features, features))


def said(features: int, rate: float, caplog: Any, kind: type[Optimizer] = AdamW) -> str:
    """What is said of this rate, for one layer."""
    return said_of(one_layer(features), rate, caplog, kind)


def said_of(
    model: nn.Module, rate: float, caplog: Any, kind: type[Optimizer] = AdamW
) -> str:
    """What is said of this rate."""
    inject_adapters(model, LoRAConfig(r=8))
    optimizer = kind([p for p in model.parameters() if p.requires_grad], lr=rate)  # type: ignore[call-arg]
    caplog.clear()
    LearningRates().optimizers_built(View(model), [optimizer], is_scaled=False)
    text: str = caplog.text
    return text


@pytest.mark.parametrize(
    ("features", "low", "usual"), [(SMALL, 1e-4, "0.002"), (LARGE, 2e-5, "0.0002")]
)
def test_a_low_rate_is_one_of_full_fine_tuning_for_a_model_of_this_size(
    features: int, low: float, usual: str, caplog: Any
) -> None:
    text = said(features, low, caplog)
    assert f"begin with {usual} in configure_optimizers" in text
    assert not said(features, 1.1 * low, caplog)


def test_weights_that_are_packed_in_4_bits_count_in_full(caplog: Any) -> None:
    model = one_layer(SMALL)
    packed: Any = nn.Parameter(torch.zeros(1, dtype=torch.uint8), requires_grad=False)
    # as bitsandbytes has it
    packed.quant_state = SimpleNamespace(shape=torch.Size([LARGE, LARGE]))
    model.register_parameter("packed", packed)
    assert "begin with 0.0002 in configure_optimizers" in said_of(model, 2e-5, caplog)


def test_the_advice_says_what_rate_a_head_has(caplog: Any) -> None:
    text = said(SMALL, 1e-5, caplog)
    assert "lr_scale=10); a head in modules_to_save keeps it" in text


def test_other_optimizers_have_the_same_limits(caplog: Any) -> None:
    assert "is known of Adam and AdamW" in said(SMALL, 1e-4, caplog, SGD)
    assert not said(LARGE, 1e-4, caplog, SGD)
    assert "is known of Adam and AdamW" in said(LARGE, 2e-5, caplog, SGD)


@pytest.mark.parametrize(("features", "usual"), [(SMALL, "0.002"), (LARGE, "0.0002")])
def test_a_high_rate_is_compared_with_the_usual_one(
    features: int, usual: str, caplog: Any
) -> None:
    assert f"0.02, which is high: {usual} is usual" in said(features, 0.02, caplog)

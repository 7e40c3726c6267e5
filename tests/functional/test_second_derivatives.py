"""Derivatives of derivatives, where the input is laid out in another way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_adapters
from tests.models import randomise

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed matrix": lambda: torch.randn(3, 4).T,
    "transposed batch": lambda: torch.randn(3, 2, 5).transpose(0, 1),
    "features first": lambda: torch.randn(2, 3, 4).mT,
    "every second": lambda: torch.randn(4, 6)[:, ::2],
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
}


def adapted(x: Tensor, dropout: float) -> Any:
    layer = nn.Linear(x.shape[-1], 4).double()
    inject_adapters(nn.Sequential(layer), LoRAConfig(r=2, dropout=dropout))
    randomise(layer, scale=1)
    return layer


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("build", LAYOUTS.values(), ids=LAYOUTS)
def test_second_derivatives_are_right_however_the_input_is_laid_out(
    build: Callable[[], Tensor], dropout: float
) -> None:
    x = build().double().requires_grad_()
    layer = adapted(x, dropout)

    def compute(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(1)
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradgradcheck(compute, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("build", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_with_gradients_drop_what_those_without_drop(build: Callable[[], Tensor], dropout: float) -> None:
    x = build().double().requires_grad_()
    layer = adapted(x, dropout)
    inputs, output = (x, layer.lora_A, layer.lora_B), layer(x).square().sum()
    first = torch.autograd.grad(output, inputs, retain_graph=True)
    for one, other in zip(torch.autograd.grad(output, inputs, create_graph=True), first, strict=True):
        torch.testing.assert_close(one, other)

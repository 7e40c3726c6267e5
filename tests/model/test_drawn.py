"""Values that an initialisation drew are told from trained ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_lora.model.fresh import block_of, is_normal, is_uniform

SHAPES = [(2, 384), (10, 768), (32, 27), (64, 64), (3072, 768), (40_000, 16), (64, 3, 7, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drawn_weights_look_drawn(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for _ in range(5):
        assert is_uniform(block_of(torch.empty(shape).uniform_(-0.1, 0.1).to(dtype)), 0.1)
        assert is_normal(block_of(torch.empty(shape).normal_(0, 0.02).to(dtype)), 0.02)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "larger": lambda weight: 1.2 * weight,
    "smaller": lambda weight: 0.8 * weight,
    "heavy tails": lambda weight: weight * weight.abs() / weight.abs().mean(),
    "slightly heavy tails": lambda weight: weight * (0.6 + 0.8 * torch.randint(2, weight.shape)).sqrt(),
    "not around zero": lambda weight: weight + 0.3 * weight.std(),
    "rows of many sizes": lambda weight: weight * torch.linspace(0.8, 1.2, len(weight)).unsqueeze(1),
    "columns of many sizes": lambda weight: weight * torch.linspace(0.8, 1.2, weight.shape[1]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_do_not(change: Callable[[Tensor], Tensor]) -> None:
    for shape in ((100, 100), (1000, 768)):
        assert not is_uniform(block_of(change(torch.empty(shape).uniform_(-0.1, 0.1))), 0.1)
        assert not is_normal(block_of(change(torch.empty(shape).normal_(0, 0.02))), 0.02)

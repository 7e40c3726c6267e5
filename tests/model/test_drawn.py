"""Values that an initialisation drew are told from trained ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lightning_lora.model.fresh import FEWEST, block_of, is_normal, is_uniform

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


def test_small_steps_leave_a_uniform_weight_its_range_no_more() -> None:
    weight = torch.empty(10, 768).uniform_(-0.1, 0.1)
    assert is_uniform(block_of(weight), 0.1)
    assert not is_uniform(block_of(weight + 0.005 * torch.randn(weight.shape).sign()), 0.1)


def test_a_block_has_rows_and_columns_of_everywhere_and_no_padding() -> None:
    weight = torch.arange(1, 301).float().unsqueeze(1) * torch.ones(300, 500)
    weight[0] = 0  # padding
    block = block_of(weight)
    assert block.shape == (99, 100) and block[0, 0] == 4 and block[-1, -1] == 298
    assert block_of(torch.zeros(300, 500)).numel() == 0
    assert block_of(torch.ones(2, 50_000)).shape == (2, 5000)
    assert block_of(torch.ones(50_000, 2)).shape == (5000, 2)
    assert block_of(torch.ones(FEWEST // 2, 2)).numel() == FEWEST

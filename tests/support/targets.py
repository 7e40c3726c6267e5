"""A model with parameters of its own, and its adapting."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_adapters


def adapted(model: nn.Module, **config: Any) -> tuple[str, ...]:
    return inject_adapters(model, LoRAConfig(**{"r": 1, **config}))


class Table(nn.Module):
    """A matrix that a module reads by itself, with parameters that are none beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.grid = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(1, 2, 3, 4))
        self.codes = nn.Parameter(torch.zeros(4, 5, dtype=torch.int32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table

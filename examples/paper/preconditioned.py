"""Gradients that suit a low-rank update: how far A moves depends on the size of B, and the reverse."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

SHORT_MEMORY = (0.7, 0.8)
"""The betas of AdamW with such gradients, which are largest while B is small: they should soon be forgotten."""


def precondition(model: nn.Module) -> None:
    """Precondition the gradients of all adapters, before the optimizer takes its step.

    Source:
        Zhang and Pilanci 2024, "Riemannian Preconditioned LoRA for Fine-Tuning
        Foundation Models", algorithm 1. The betas and the number on the diagonal are
        those of its code for GPT-2.
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "lora_A"):
            precondition_pair(layer.lora_A, layer.lora_B)


def precondition_pair(a: nn.Parameter, b: nn.Parameter) -> None:
    """Multiply each gradient by the inverse of the other factor's products."""
    if a.grad is None or b.grad is None:
        return
    for_a = torch.linalg.solve(products(b.T), a.grad)
    for_b = torch.linalg.solve(products(a), b.grad.T)
    a.grad = for_a
    b.grad = for_b.T.contiguous()


@torch.no_grad()
def products(rows: Tensor) -> Tensor:
    """Return the product of each row with each other one.

    It can be inverted, also if all are zero.
    """
    return rows @ rows.T + 1e-6 * torch.eye(len(rows))

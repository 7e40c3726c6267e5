"""Training in plain torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora import inject_adapters
from tests.support.models import LitTiny, data, lora


def trainable(model: LitTiny) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(parameters: Any) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=0.05)


def by_hand(
    optimizer: Optimizer,
    model: LitTiny,
    *,
    step: Callable[[], Any] = lambda: None,
    every: Callable[[int], int] = lambda _: 1,
    clip: Callable[[list[nn.Parameter]], Any] = lambda _: None,
) -> None:
    """Train three epochs in plain torch."""
    batches = list(data())
    for epoch in range(3):
        for first in range(0, len(batches), every(epoch)):
            chunk = batches[first : first + every(epoch)]

            def closure(chunk: Any = chunk, epoch: int = epoch) -> Tensor:
                optimizer.zero_grad()
                for batch in chunk:
                    value = model.loss(batch) / every(epoch)
                    value.backward()
                clip([p for group in optimizer.param_groups for p in group["params"]])
                return value

            optimizer.step(closure)  # type: ignore[arg-type]
            step()


def adapted() -> LitTiny:
    torch.manual_seed(5)
    model = LitTiny()
    inject_adapters(model, lora().config)
    return model

"""A layer on which an injection fails."""

from typing import Any

import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters, merge_adapters
from tests.support.models import randomise


class Stubborn(nn.Parameter):
    """A parameter that cannot be frozen."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        if not requires_grad:
            raise RuntimeError("cannot be frozen")
        return super().requires_grad_(requires_grad)


def unfreezable() -> nn.Linear:
    """A layer on which an injection fails, when what comes before it is frozen already."""
    layer = nn.Linear(4, 4)
    layer.weight = Stubborn(torch.zeros(4, 4))
    return layer


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters() if "lora_" not in name}


def as_trained(model: Any, **config: Any) -> Any:
    """The same model, with adapters that are as if trained."""
    inject_adapters(model, LoRAConfig(**{"r": 2, **config}))
    randomise(model)
    return model


def as_merged(model: Any, **config: Any) -> Any:
    """The same model, with such adapters merged into it."""
    merge_adapters(as_trained(model, **config))
    return model

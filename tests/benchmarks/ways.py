"""The ways to fine-tune that are compared. Each adapts the same layers, in place, at the same rank."""

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters

FLOOR, OURS, PEFT, LORALIB = "frozen", "lightning_lora", "peft", "loralib"
PEFT_SAME = "peft, adapters in bf16"
"""With autocast_adapter_dtype=False."""


def frozen(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    """Train nothing: the floor under all others, which must take gradients through the model too."""
    return model.requires_grad_(False)


def ours(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    inject_adapters(model, LoRAConfig(r=r, dropout=dropout, target_modules=names))
    return model


def peft(model: nn.Module, names: list[str], r: int, dropout: float, *, autocast: bool = True) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout, target_modules=names)
    model.config = getattr(model, "config", {"tie_word_embeddings": False})
    return get_peft_model(model, config, autocast_adapter_dtype=autocast).get_base_model()


def peft_same(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    return peft(model, names, r, dropout, autocast=False)


def loralib(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    from loralib import Linear, mark_only_lora_as_trainable

    for name in names:
        old: Any = model.get_submodule(name)
        new = Linear(
            old.in_features,
            old.out_features,
            r=r,
            lora_alpha=r,
            lora_dropout=dropout,
            merge_weights=False,
            bias=old.bias is not None,
        )
        new.to(old.weight.device, old.weight.dtype)
        new.weight, new.bias = old.weight, old.bias
        model.set_submodule(name, new)
    mark_only_lora_as_trainable(model)
    return model


WAYS: dict[str, Callable[[nn.Module, list[str], int, float], nn.Module]] = {
    FLOOR: frozen,
    OURS: ours,
    PEFT: peft,
    PEFT_SAME: peft_same,
    LORALIB: loralib,
}


def ways_in(dtype: torch.dtype) -> list[str]:
    """Return the ways that differ over a base of this dtype."""
    return [name for name in WAYS if name != PEFT_SAME or dtype is not torch.float32]


def each_way(
    model: nn.Module, names: list[str], *, r: int = 8, dropout: float = 0.0, only: Collection[str] = tuple(WAYS)
) -> dict[str, nn.Module]:
    """Adapt copies of ``model`` in every way. The adapters have trained: no factor is zero."""
    models = {}
    shared = {
        id(t): t for t in (*model.parameters(), *model.buffers())
    }  # one base for all: none has it in a cache before another
    for name in only:
        models[name] = WAYS[name](copy.deepcopy(model, dict(shared)), names, r, dropout)
        for parameter in models[name].parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.01)
    return models


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def half(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

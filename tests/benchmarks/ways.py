"""The methods that are compared: each adapts the same layers in place, with the same rank."""

import copy
from collections.abc import Callable, Collection
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject_adapters

FLOOR, OURS, PEFT, LORALIB = "frozen", "lightning_lora", "peft", "loralib"
PEFT_SAME = "peft, adapters in bf16"
"""peft with autocast_adapter_dtype=False."""
ARITHMETIC = "arithmetic alone"
"""Only an adapter's matrix products, added to the layer's output: no switch, no check, one dtype, no dropout.

A practical lower bound, not a usable method.
"""


def frozen(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    """The baseline: the other methods need the gradients through the model too."""
    return model.requires_grad_(False)


def ours(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    inject_adapters(
        model, LoRAConfig(r=r, alpha=None, dropout=dropout, target_modules=names)
    )
    return model


def peft(
    model: nn.Module, names: list[str], r: int, dropout: float, *, autocast: bool = True
) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, lora_dropout=dropout, target_modules=names)
    model.config = getattr(model, "config", {"tie_word_embeddings": False})
    return get_peft_model(
        model, config, autocast_adapter_dtype=autocast
    ).get_base_model()


def loralib(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    from loralib import Linear, mark_only_lora_as_trainable

    for name in names:
        old: Any = model.get_submodule(name)
        how = {
            "r": r,
            "lora_alpha": r,
            "lora_dropout": dropout,
            "bias": old.bias is not None,
        }
        new = Linear(old.in_features, old.out_features, merge_weights=False, **how)
        new.to(old.weight.device, old.weight.dtype)
        new.weight = old.weight
        new.bias = old.bias
        model.set_submodule(name, new)
    mark_only_lora_as_trainable(model)
    return model


def arithmetic(model: nn.Module, names: list[str], r: int, dropout: float) -> nn.Module:
    model.requires_grad_(False)
    for name in names:
        layer: Any = model.get_submodule(name)
        layer.lora_A = nn.Parameter(layer.weight.new_empty(r, layer.in_features))
        layer.lora_B = nn.Parameter(layer.weight.new_empty(layer.out_features, r))
        layer.forward = MethodType(_products, layer)
    return model


def _products(layer: Any, x: Tensor) -> Tensor:
    if torch.is_grad_enabled():
        return _Products.apply(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B)  # type: ignore[no-any-return, no-untyped-call]
    if x.numel() <= layer.lora_A.numel():
        return F.linear(x, layer.weight, layer.bias) + F.linear(
            F.linear(x, layer.lora_A), layer.lora_B
        )
    return _added(x, layer.weight, layer.bias, layer.lora_A, layer.lora_B)[0]


def _added(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    h = a @ x.reshape(-1, x.shape[-1]).T
    y = F.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(h.T, b.T)
    return y, h


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        y, h = _added(x, weight, bias, a, b)
        ctx.save_for_backward(x, weight, a, b, h)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, h = ctx.saved_tensors
        out = grad.reshape(-1, grad.shape[-1])
        g = b.T @ out.T
        grad_B = (h @ out).T
        grad_x = grad @ weight
        grad_x.view(-1, x.shape[-1]).addmm_(g.T, a)
        return grad_x, None, None, g @ x.reshape(-1, x.shape[-1]), grad_B


WAYS: dict[str, Callable[[nn.Module, list[str], int, float], nn.Module]] = {
    FLOOR: frozen,
    OURS: ours,
    PEFT: peft,
    PEFT_SAME: partial(peft, autocast=False),
    LORALIB: loralib,
    ARITHMETIC: arithmetic,
}


def ways_in(dtype: torch.dtype) -> list[str]:
    left_out = {ARITHMETIC, PEFT_SAME} if dtype is torch.float32 else {ARITHMETIC}
    return [name for name in WAYS if name not in left_out]


def each_way(
    model: nn.Module,
    names: list[str],
    *,
    r: int = 8,
    dropout: float = 0.0,
    only: Collection[str] = tuple(WAYS),
) -> dict[str, nn.Module]:
    """Adapt copies of ``model`` with every method.

    All factors are random, as after training: none is zero.
    """
    models = {name: WAYS[name](copy_of(model), names, r, dropout) for name in only}
    for each in models.values():
        randomise(each)
    return models


def copy_of(model: nn.Module) -> nn.Module:
    """Copy all but the weights: one base for all, so that no method has it in the cache before another."""
    return copy.deepcopy(
        model, {id(t): t for t in (*model.parameters(), *model.buffers())}
    )


def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.01)


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


def counted(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"


def half(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]

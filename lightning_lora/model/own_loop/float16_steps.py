"""Optimizers that would take the steps of float16 weights in float16, and end in NaN."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_lora.errors import OptimizerError, listed
from lightning_lora.model.view import View
from lightning_lora.tensors.dicts import where, with_values

_IN_FLOAT32: "WeakSet[nn.Module]" = WeakSet()
"""The models whose Trainer lets float16 weights take their steps in float32."""


@contextmanager
def steps_are_in_float32(model: nn.Module) -> Iterator[None]:
    """Let float16 weights of ``model`` train: inside the ``with`` block, an optimizer sees them in float32."""
    _IN_FLOAT32.add(model)
    try:
        yield
    finally:
        _IN_FLOAT32.discard(model)


def check_dtypes(view: View, optimizer: Optimizer, held: set[nn.Parameter]) -> None:
    """Refuse an optimizer that holds float16 weights which train in full, if adapters are kept in float32."""
    if not view.is_on_layers or not view.config.autocast_adapter_dtype:
        return
    halves = where(with_values(view.trainable_base, held), _trains_in_float16)
    if (
        halves
        and _gives_nan_in_float16(optimizer)
        and not _steps_in_float32(view.model)
    ):
        raise OptimizerError(
            f"{listed(halves)} of {view.title} train in full in float16, in which "
            f"{type(optimizer).__name__} ends in NaN. Keep the weights in float32 "
            "(with autocast) or bfloat16, or use a Trainer with LoRACallback, which "
            "takes these steps in float32."
        )


def _trains_in_float16(parameter: nn.Parameter) -> bool:
    return parameter.dtype == torch.float16 and parameter.requires_grad


def _gives_nan_in_float16(optimizer: Optimizer) -> bool:
    """Whether an optimizer has an epsilon that is zero in float16, as Adam's 1e-8: then it may divide by zero."""
    for group in optimizer.param_groups:
        epsilon = group.get("eps")
        if (
            isinstance(epsilon, float)
            and torch.tensor(epsilon, dtype=torch.float16) == 0
        ):
            return True
    return False


def _steps_in_float32(model: nn.Module) -> bool:
    """Whether a model is one, or lies in one, whose optimizers see float16 weights in float32."""
    return any(model in set(outer.modules()) for outer in _IN_FLOAT32)

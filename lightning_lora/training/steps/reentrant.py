"""Reentrant activation checkpoints, whose inputs require no gradient if the layers before them are frozen."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as recompute
from torch import Tensor, nn

from lightning_lora.model.records import state_of

CHECKPOINT_FUNCTION = recompute.CheckpointFunction
"""torch's own, also while ours takes its place."""

_RUNNING: list[nn.Module] = []
"""The models whose steps run. A step may run a fit of another model."""


@contextmanager
def letting_gradients_pass(model: nn.Module) -> Iterator[None]:
    """Let gradients pass reentrant activation checkpoints in a training step.

    torch's function finds no input that requires a gradient, and keeps nothing of the
    call. It offers no hook. So for a step, a function of ours takes its place, unless
    other code has put its own there.
    """
    _RUNNING.append(model)
    if recompute.CheckpointFunction is CHECKPOINT_FUNCTION:
        recompute.CheckpointFunction = _RequiringGradients  # type: ignore[misc]
    try:
        yield
    finally:
        _RUNNING.remove(model)
        if not _RUNNING and recompute.CheckpointFunction is _RequiringGradients:
            recompute.CheckpointFunction = CHECKPOINT_FUNCTION  # type: ignore[misc]


class _RequiringGradients(CHECKPOINT_FUNCTION):
    """torch's function, but if none of its inputs requires a gradient, all do.

    While adapters are disabled, it is as torch's own: the backward pass would compute
    the layers with the adapters.
    """

    @classmethod
    def apply(cls, function: Any, preserve_rng_state: bool, *inputs: Any) -> Any:
        if _are_overlooked(inputs):
            inputs = tuple(map(_requiring_grad, inputs))
        return super().apply(function, preserve_rng_state, *inputs)  # type: ignore[no-untyped-call]  # torch's own


def _are_overlooked(inputs: tuple[Any, ...]) -> bool:
    """Whether torch would keep nothing of a call, though adapters inside it may train."""
    if not torch.is_grad_enabled() or any(map(_shows_base, _RUNNING)):
        return False
    return not any(map(_requires_grad, inputs))


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _requiring_grad(value: Any) -> Any:
    """An input that requires a gradient, if it is a tensor that may."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _shows_base(model: nn.Module) -> bool:
    """Whether adapters are disabled in a model whose step runs."""
    return state_of(model).shows_base

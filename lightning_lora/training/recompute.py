"""Reentrant gradient checkpointing over a frozen base.

``torch.utils.checkpoint`` with ``use_reentrant=True`` passes gradients only if one of its inputs asks for one; it does
not see the parameters inside. Behind a frozen embedding no input asks, and all that is inside would stay untrained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint as recompute
from torch import Tensor


@contextmanager
def gradients_pass() -> Iterator[None]:
    """Let an input of every reentrant checkpoint ask for a gradient, for a while."""
    own = recompute.CheckpointFunction
    recompute.CheckpointFunction = _Asking  # type: ignore[misc]
    try:
        yield
    finally:
        recompute.CheckpointFunction = own  # type: ignore[misc]


class _Asking(recompute.CheckpointFunction):
    """The same function, of inputs that ask for a gradient if none did."""

    @classmethod
    def apply(cls, function: Any, preserve_rng_state: bool, *inputs: Any) -> Any:
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and not any(tensor.requires_grad for tensor in tensors):
            inputs = tuple(
                value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in inputs
            )
        return super().apply(function, preserve_rng_state, *inputs)  # type: ignore[no-untyped-call]  # torch's own

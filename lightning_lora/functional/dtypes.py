"""The dtypes that updates are computed in."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or float32 if that is wider.

    A narrower dtype would lose small updates.
    """
    return torch.promote_types(dtype, torch.float32)


def precise(tensor: Tensor) -> Tensor:
    """Return the values in float64, without a gradient.

    MPS has no float64: they are on the CPU then.
    """
    return tensor.detach().to(
        "cpu" if tensor.device.type == "mps" else tensor.device, torch.float64
    )


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in a dtype: the same object if it has it, without a call of torch."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)

"""Tensors of an adapted linear layer, and its plain composition."""

import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.functional as F
from torch import Tensor


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)


def inputs(*shape: int, out: int = 5, r: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = (shape, (out, shape[-1]), (out,), (r, shape[-1]), (out, r))
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def goes_by_hand(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_AdaptedLinearBackward"

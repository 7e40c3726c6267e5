"""A frozen convolution that uses packed copies of its kernel."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from lightning_lora.functional.packing import PackedWeight, can_be_packed
from lightning_lora.functional.plain import are_plain, is_autocast_enabled
from lightning_lora.functional.products import has_onednn


class Geometry(NamedTuple):
    """How a kernel moves: torch's arguments, for height and width."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def frozen_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, packed: PackedWeight
) -> Tensor | None:
    r"""Convolve with packed copies, or return None.

    Packed are convolutions in float32 of images in the memory format ``torch.channels_last``. The output has this
    format too. It may differ by rounding from that of torch's own convolution.

    Args:
        x: The images.
        weight: The kernel.
        bias: The bias, or None.
        geometry: How the kernel moves.
        packed: Where to keep the copies.

    Returns:
        The output, or None for what cannot be packed: use torch's own convolution then.

    Shape:
        ``x``: (N, in, H, W), ``weight``: (out, in / groups, \*kernel), ``bias``: (out). Returns (N, out, H', W').
    """
    if not are_plain(x, weight, bias) or not _are_images(x) or is_autocast_enabled(x):
        return None
    if not all(t is None or t.dtype is torch.float32 for t in (x, weight, bias)):
        return None
    if not has_onednn(torch.float32) or not can_be_packed(weight):
        return None
    copies = packed.copies(weight, torch.float32, lambda kernel: _pack(kernel, geometry))
    return _FrozenConvolution.apply(x, weight, bias, geometry, copies)  # type: ignore[no-any-return, no-untyped-call]


def _are_images(x: Tensor) -> bool:
    in_format = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x.is_cpu and in_format and not x.is_contiguous()  # both at once say nothing of the format to return


def _pack(kernel: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    operators = torch.ops.mkldnn
    return (
        operators._reorder_convolution_weight(kernel, padding, stride, dilation, groups),
        operators._reorder_convolution_transpose_weight(kernel, padding, (0, 0), stride, dilation, groups),
    )


class _FrozenConvolution(torch.autograd.Function):
    """The gradient of x is the transposed convolution of that of the output."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Convolve."""
        x, weight, bias, ctx.geometry, (forward, ctx.copy) = args
        ctx.shape = x.shape
        ctx.save_for_backward(weight)
        stride, padding, dilation, groups = ctx.geometry
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, forward, bias, padding, stride, dilation, groups, "none", [], ""
        )
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x and of the bias."""
        (weight,) = ctx.saved_tensors
        for_x, _, for_bias, *_ = ctx.needs_input_grad
        grad_x = None
        if for_x and torch.is_grad_enabled():
            grad_x = conv2d_input(ctx.shape, weight, grad, *ctx.geometry)
        elif for_x:
            grad_x = _transposed(grad, ctx.copy, weight.shape, ctx.shape, ctx.geometry)
        return grad_x, None, grad.sum((0, 2, 3)) if for_bias else None, None, None


def _transposed(grad: Tensor, copy: Tensor, kernel: torch.Size, shape: torch.Size, geometry: Geometry) -> Tensor:
    """The transposed convolution of the output's gradient, of the shape of the input."""
    stride, padding, dilation, groups = geometry
    rest = [  # rows and columns of the input that the kernel's last step does not reach
        size - ((steps - 1) * s - 2 * p + d * (k - 1) + 1)
        for size, steps, s, p, d, k in zip(
            shape[2:], grad.shape[2:], stride, padding, dilation, kernel[2:], strict=True
        )
    ]
    result: Tensor = torch.ops.mkldnn._convolution_transpose_pointwise(
        grad, copy, None, padding, rest, stride, dilation, groups, "none", [], ""
    )
    return result

"""Convolutions and transposed convolutions with a low-rank update."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.contract import TransposedKind
from lightning_lora.private import CONVOLVES, convolve


class LoRAConvNd(LoRALayer):
    r"""A convolution with a low-rank update.

    The update convolves with A, to r channels, and then with B, whose kernel has size
    1.

    All groups share A, and each has its own rows of B. With several groups, the product
    :math:`B A` is smaller: the layer convolves with that.

    Shape:
        weight: (out, in / groups, \*kernel); lora_A: (r, in / groups · kernel); lora_B:
        (out, r). Input (N, in, \*size), output (N, out, \*size').
    """

    lora_layer_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    lora_methods = ("forward", CONVOLVES)
    lora_fits_dora = True
    lora_output_is_new = True
    lora_options = ("groups", "dilation", "padding_mode")
    groups: int

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return (out, in / groups · kernel)."""
        return weight.flatten(1)

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, input: Tensor) -> Tensor:
        """Convolve with A, then with B, or with their product."""
        layer: Any = self
        a = lora_A.to(input.dtype)
        b = lora_B.to(input.dtype) * self.lora_settings.scaling
        shape = layer.weight.shape
        if self.groups > 1:
            return convolve(layer, input, (b @ a).view(shape))
        kernel_size = shape[2:]
        spatial_dims = len(kernel_size)
        if _is_pointwise(layer, kernel_size):
            hidden = _pointwise(input, a, spatial_dims)
        else:
            kernel = a.view(-1, *shape[1:])
            hidden = convolve(layer, input, kernel)
        return _pointwise(hidden, b, spatial_dims)


class LoRAConvTransposeNd(TransposedKind, LoRALayer):
    r"""A transposed convolution with a low-rank update.

    A is a convolution to r channels, whose kernel has size 1. B has the kernel of the
    layer.

    Shape:
        weight: (in, out / groups, \*kernel); lora_A: (r, in); lora_B: (out / groups ·
        kernel, r). Input (N, in, \*size), output (N, out, \*size').
    """

    lora_layer_types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    lora_writes_rows = False
    lora_output_is_new = True
    lora_options = ("groups", "dilation", "padding_mode")
    groups: int
    weight: nn.Parameter

    def lora_update(
        self, lora_A: Tensor, lora_B: Tensor, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Convolve with A, then with B, or with their product."""
        a = lora_A.to(input.dtype)
        b = lora_B.to(input.dtype) * self.lora_settings.scaling
        if self.groups > 1:
            hidden = input
            matrix = b @ a
        else:
            spatial_dims = self.weight.dim() - 2
            hidden = _pointwise(input, a, spatial_dims)
            matrix = b
        kernel = matrix.T.reshape(-1, *self.weight.shape[1:])
        output: Tensor = self.lora_run_on(
            {"weight": kernel, "bias": None}, hidden, *args, **kwargs
        )
        return output


def _is_pointwise(layer: Any, kernel_size: torch.Size) -> bool:
    """Whether a convolution with a kernel of this size multiplies each place by itself."""
    reads_one_place = kernel_size.numel() == 1
    reads_each_place = set(_each(layer.stride)) == {1}
    return reads_one_place and reads_each_place and not _pads(layer)


def _pads(layer: Any) -> bool:
    """Whether a convolution with a kernel of size 1 pads its input, and so has more places in its output.

    The paddings ``"same"`` and ``"valid"`` add no places for such a kernel.
    """
    return not isinstance(layer.padding, str) and any(_each(layer.padding))


def _each(value: int | Sequence[int]) -> Sequence[int]:
    """A stride or a padding for each dimension.

    A layer holds a tuple of them. Code that sets one later may give one number for all.
    """
    return (value,) if isinstance(value, int) else value


def _pointwise(x: Tensor, matrix: Tensor, spatial_dims: int) -> Tensor:
    r"""Convolve (N, in, \*size) or (in, \*size) with a kernel of size 1: as a product, faster than torch's own."""
    channel_dim = x.dim() - spatial_dims - 1
    channels_last = x.movedim(channel_dim, -1)
    if channels_last.is_contiguous():
        return F.linear(channels_last, matrix).movedim(-1, channel_dim)
    columns = x.flatten(-spatial_dims)  # one for each place
    product = _product(matrix, columns)
    return product.view(*product.shape[:-1], *x.shape[-spatial_dims:])


def _product(matrix: Tensor, columns: Tensor) -> Tensor:
    """Multiply columns (in, places) or (N, in, places) by a matrix (out, in)."""
    if columns.dim() == 2:
        return matrix @ columns
    stacked = matrix.expand(len(columns), *matrix.shape)
    return torch.bmm(stacked, columns)

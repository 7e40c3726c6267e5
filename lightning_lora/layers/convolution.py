"""Convolutions, plain and transposed, with a low-rank update."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer


class LoRAConvNd(LoRALayer):
    r"""Convolve with A, whose kernel has r channels, then mix these at every place by B.

    As a matrix, the weight has a row for each channel that it writes, and a column for each place in the kernel of each
    channel that one group reads. Under ``groups``, every group has the same A and its own rows of B; there the
    convolution is done with :math:`B A` itself, which is the smaller.

    Shape:
        weight: (out, in / groups, \*kernel); lora_A: (r, in / groups · kernel); lora_B: (out, r).
        Input (N, in, \*size), output (N, out, \*size').

    Source:
        Hu et al. 2021, section 4.1, on the weight as such a matrix: a convolution with :math:`B A` is one with A and
        then one of size 1 with B, since it is linear in its kernel.
    """

    lora_layer_types = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    lora_methods = ("forward", "_conv_forward")
    lora_fits_dora = True
    groups: int

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        r"""Return a weight (out, in / groups, \*kernel) as (out, in / groups · kernel)."""
        return weight.flatten(1)

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, input: Tensor) -> Tensor:
        """Convolve with one factor after the other, or with their product."""
        own: Any = self
        a, b = lora_A.to(input.dtype), lora_B.to(input.dtype) * self.lora_settings.scaling
        kernel = own.weight.shape[1:]
        if self.groups > 1:
            return own._conv_forward(input, (b @ a).view(own.weight.shape), None)  # type: ignore[no-any-return]
        return _pointwise(own._conv_forward(input, a.view(-1, *kernel), None), b, len(kernel) - 1)


class LoRAConvTransposeNd(LoRALayer):
    r"""Mix the channels by A at every place, then spread these r by the transposed convolution with B.

    It is the mirror image of a convolution: as a matrix, the weight has a column for each channel that it reads.

    Shape:
        weight: (in, out / groups, \*kernel); lora_A: (r, in); lora_B: (out / groups · kernel, r).
        Input (N, in, \*size), output (N, out, \*size').

    Source:
        Hu et al. 2021, section 4.1, on the weight as such a matrix.
    """

    lora_layer_types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    lora_writes_rows = False
    groups: int
    weight: nn.Parameter

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        r"""Return a weight (in, out / groups, \*kernel) as (out / groups · kernel, in)."""
        return weight.flatten(1).T

    @staticmethod
    def lora_as_weight(matrix: Tensor, weight: Tensor) -> Tensor:
        r"""Lay out a matrix (out / groups · kernel, in) as (in, out / groups, \*kernel)."""
        return matrix.T.reshape(weight.shape)

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Convolve with one factor after the other, or with their product."""
        a, b = lora_A.to(input.dtype), lora_B.to(input.dtype) * self.lora_settings.scaling
        if self.groups > 1:
            hidden, kernel = input, (b @ a).T
        else:
            hidden, kernel = _pointwise(input, a, self.weight.dim() - 2), b.T
        kernel = kernel.reshape(-1, *self.weight.shape[1:])
        output: Tensor = self.lora_run_on({"weight": kernel, "bias": None}, hidden, *args, **kwargs)
        return output


def _pointwise(x: Tensor, matrix: Tensor, dims: int) -> Tensor:
    r"""Mix the channels of (N, in, \*size), or (in, \*size), by a matrix (out, in)."""
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolve(x, matrix.view(*matrix.shape, *(1,) * dims))

"""nn.Bilinear with a low-rank update."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer


class LoRABilinear(LoRALayer):
    r"""Compute :math:`x_1^T W x_2 + b`, and the update from r products of the inputs, which B mixes.

    As a matrix, the weight has a row for each feature that it writes, and a column for each pair of features that it
    reads. Dropout is of the first input, in which the layer is linear too.

    Shape:
        weight: (out, in1, in2); lora_A: (r, in1 · in2); lora_B: (out, r). Inputs (\*, in1) and (\*, in2), output
        (\*, out).

    Source:
        Hu et al. 2021, section 4.1, on the weight as such a matrix.
    """

    lora_layer_types = (nn.Bilinear,)
    lora_input = "input1"
    weight: nn.Parameter

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return a weight (out, in1, in2) as (out, in1 · in2)."""
        return weight.flatten(1)

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, input1: Tensor, input2: Tensor) -> Tensor:
        """Multiply the inputs by r bilinear forms, and these by B."""
        forms: Any = lora_A.to(input1.dtype).view(-1, *self.weight.shape[1:])
        hidden = F.bilinear(input1, input2, forms)
        return F.linear(hidden * self.lora_settings.scaling, lora_B.to(hidden.dtype))

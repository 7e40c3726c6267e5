"""nn.Bilinear with a low-rank update."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.layers.base import LoRALayer


class LoRABilinear(LoRALayer):
    r"""A bilinear layer, :math:`x_1^T W x_2 + b`: A gives r bilinear products of the inputs, and B combines them.

    Dropout applies to the first input: the layer is linear in it too.

    Shape:
        weight: (out, in1, in2); lora_A: (r, in1 · in2); lora_B: (out, r). Input (\*,
        in1), (\*, in2); output (\*, out).
    """

    lora_layer_types = (nn.Bilinear,)
    weight: nn.Parameter

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return (out, in1 · in2)."""
        return weight.flatten(1)

    def lora_update(
        self, lora_A: Tensor, lora_B: Tensor, input1: Tensor, input2: Tensor
    ) -> Tensor:
        """Compute r bilinear products, then multiply by B."""
        size_of_a_form = self.weight.shape[1:]
        forms: Any = lora_A.to(input1.dtype).view(-1, *size_of_a_form)
        hidden = F.bilinear(input1, input2, forms)
        return F.linear(hidden * self.lora_settings.scaling, lora_B.to(hidden.dtype))

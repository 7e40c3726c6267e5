"""nn.Linear with a low-rank update."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora.functional import low_rank_update
from lightning_lora.layers.base import LoRALayer


class LoRALinear(LoRALayer):
    r"""Compute :math:`x W^T + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: (out, in); lora_A: (r, in); lora_B: (out, r). Input (\*, in), output (\*, out).

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    lora_layer_type = nn.Linear
    bias: nn.Parameter | None

    @staticmethod
    def lora_features(layer: Any) -> tuple[int, int]:
        """Return the sides of the weight, (out, in), the other way round."""
        writes, reads = layer.weight.shape
        return reads, writes

    def lora_forward(self, input: Tensor) -> Tensor:  # the name nn.Linear gives it
        """Compute the layer and add the update."""
        dropout = self.lora_dropout if self.training else 0.0
        output = F.linear(input, self.weight, self.bias)
        return output + low_rank_update(input, self.lora_A, self.lora_B, self.lora_scaling, dropout)

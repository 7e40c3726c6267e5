"""transformers' Conv1D, GPT-2's linear layer whose weight is laid out (in, out), with a low-rank update."""

from typing import Any

from torch import Tensor, nn

from lightning_lora.functional import low_rank_update
from lightning_lora.layers.base import LoRALayer


class LoRAConv1D(LoRALayer):
    r"""Compute :math:`x W + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: (in, out); lora_A: (r, in); lora_B: (out, r). Input (\*, in), output (\*, out).

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    lora_layer_type = "transformers.pytorch_utils.Conv1D"
    bias: nn.Parameter

    @staticmethod
    def lora_features(layer: Any) -> tuple[int, int]:
        """Return the sides of the weight, (in, out)."""
        reads, writes = layer.weight.shape
        return reads, writes

    @staticmethod
    def lora_as_weight(delta: Tensor) -> Tensor:
        """Lay out an update (out, in) as (in, out)."""
        return delta.T

    def lora_forward(self, x: Tensor) -> Tensor:
        """Compute the layer and add the update."""
        dropout = self.lora_dropout if self.training else 0.0
        output: Tensor = self.overlaid[1].forward(self, x)  # type: ignore[attr-defined]  # a module's class
        return output + low_rank_update(x, self.lora_A, self.lora_B, self.lora_scaling, dropout)

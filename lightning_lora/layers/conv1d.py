"""transformers' Conv1D, GPT-2's linear layer whose weight is laid out (in, out), with a low-rank update."""

from typing import Any

from torch import Tensor

from lightning_lora.layers.linear import LoRALinear


class LoRAConv1D(LoRALinear):
    r"""Compute :math:`x W + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: (in, out); lora_A: (r, in); lora_B: (out, r). Input (\*, in), output (\*, out).

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    lora_layer_types = ("transformers.pytorch_utils.Conv1D",)

    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        """Return a weight (in, out) as (out, in)."""
        return weight.T

    @staticmethod
    def lora_as_weight(matrix: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG004
        """Lay out a matrix (out, in) as (in, out)."""
        return matrix.T

    def lora_forward(self, x: Tensor) -> Any:
        """Compute both at once; with DoRA, one after the other."""
        return super().lora_forward(x)

"""transformers' Conv1D with a low-rank update: GPT-2's linear layer, whose weight has the shape (in, out)."""

from typing import Any

from torch import Tensor

from lightning_lora.layers.contract import TransposedKind
from lightning_lora.layers.linear import LoRALinear


class LoRAConv1D(TransposedKind, LoRALinear):
    r"""A Conv1D of transformers, which computes :math:`x W + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: (in, out); lora_A: (r, in); lora_B: (out, r). Input (\*, in), output (\*, out).
    """

    lora_layer_types = ("transformers.pytorch_utils.Conv1D",)

    def lora_forward(self, x: Tensor) -> Any:
        """Compute the output and its update. The argument has its name in Conv1D."""
        return super().lora_forward(x)

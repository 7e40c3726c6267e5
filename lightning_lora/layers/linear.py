"""nn.Linear with a low-rank update."""

from typing import ClassVar

from torch import Tensor, nn

from lightning_lora.functional import low_rank_update
from lightning_lora.layers.base import LayerTypes, LoRALayer


class LoRALinear(LoRALayer):
    r"""Compute :math:`x W^T + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: (out, in); lora_A: (r, in); lora_B: (out, r). Input (\*, in), output (\*, out).

    Source:
        Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
    """

    lora_layer_types: ClassVar[LayerTypes] = (nn.Linear,)
    lora_is_linear = True
    lora_fits_dora = True

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, input: Tensor) -> Tensor:
        """Multiply by one factor after the other."""
        return low_rank_update(input, lora_A, lora_B, self.lora_settings.scaling)

"""nn.Linear, and transformers' Conv1D, with a low-rank update."""

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_lora.functional.adapted_linear import adapted_linear, low_rank_update
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.contract import LayerTypes, TransposedKind


class LoRALinear(LoRALayer):
    r"""A linear layer, which computes :math:`x W^T + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: (out, in); lora_A: (r, in); lora_B: (out, r). Input (\*, in), output
        (\*, out).
    """

    lora_layer_types: ClassVar[LayerTypes] = (nn.Linear,)
    lora_is_linear = True
    lora_fits_dora = True
    lora_reads_rows = True
    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def lora_forward(self, input: Tensor) -> Any:
        """Compute the output and its update.

        Without DoRA, one function computes both.
        """
        settings = self.lora_settings
        if settings.use_dora:
            return super().lora_forward(input)
        # Most layers need neither lora_dropout nor lora_factors. With a few tokens, the
        # time of these calls counts.
        dropout = settings.dropout and self.lora_dropout()
        # with slices, there is no lora_A, but lora_A_q for the slice q
        has_slices = self.lora_matrices[0].name != ""
        # lora_A is no plain parameter if it is a DTensor, or if this is a replica
        if (
            has_slices
            or settings.is_difference
            or type(self.lora_A) is not nn.Parameter
        ):
            a, b = self.lora_factors("weight")
        else:
            a, b = self.lora_A, self.lora_B
        return adapted_linear(
            input,
            self.lora_as_matrix(self.weight),
            self.bias,
            a,
            b,
            settings.scaling,
            dropout,
        )

    def lora_update(
        self, lora_A: Tensor, lora_B: Tensor, *args: Tensor, **kwargs: Tensor
    ) -> Tensor:
        """Compute the update: multiply the one input by A, then by B."""
        (x,) = (*args, *kwargs.values())
        return low_rank_update(x, lora_A, lora_B, self.lora_settings.scaling)


class LoRAConv1D(TransposedKind, LoRALinear):
    r"""GPT-2's linear layer, with its weight as (in, out): :math:`x W + b + s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: (in, out); lora_A: (r, in); lora_B: (out, r). Input (\*, in), output
        (\*, out).
    """

    lora_layer_types = ("transformers.pytorch_utils.Conv1D",)

    def lora_forward(self, x: Tensor) -> Any:
        """Compute the output and its update. The argument has its name in Conv1D."""
        return super().lora_forward(x)

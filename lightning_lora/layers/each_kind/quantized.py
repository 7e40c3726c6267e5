"""Quantised linear layers with a low-rank update (QLoRA).

The update is not quantised.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.contract import LayerTypes
from lightning_lora.layers.each_kind.linear import LoRALinear
from lightning_lora.layers.matrices import AdaptedMatrix

LINEAR_4BIT = "bitsandbytes.nn.modules.Linear4bit"
LINEAR_8BIT = "bitsandbytes.nn.modules.Linear8bitLt"


class LoRALinear4bit(LoRALinear):
    r"""A 4-bit linear layer of bitsandbytes.

    It adds :math:`s \, \mathrm{dropout}(x) A^T B^T` to its output.

    Shape:
        weight: (out, in), packed; lora_A: (r, in); lora_B: (out, r). Input (\*, in),
        output (\*, out).

    Source:
        Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section
        3, equation 5.
    """

    lora_layer_types: ClassVar[LayerTypes] = (LINEAR_4BIT,)
    lora_forward = LoRALayer.lora_forward  # only the layer itself can read its weight

    @classmethod
    def lora_matrices_of(cls, layer: Any) -> tuple[AdaptedMatrix, ...]:
        """Return the matrix that the packed weight represents."""
        return (
            AdaptedMatrix(
                "weight", layer.in_features, layer.out_features, rows=layer.out_features
            ),
        )

    @staticmethod
    def lora_is_quantised(layer: Any) -> bool:  # noqa: ARG004  # all of this type are
        """Whether the weight is quantised, here always."""
        return True

    @staticmethod
    def lora_dtype(layer: Any, weight: Any) -> torch.dtype:
        """Return the dtype that the layer computes in."""
        if layer.compute_dtype is not None:
            return layer.compute_dtype  # type: ignore[no-any-return]
        if weight.quant_state is None:  # not quantised before it is moved
            return weight.dtype  # type: ignore[no-any-return]
        return weight.quant_state.dtype  # type: ignore[no-any-return]

    @staticmethod
    def lora_entries(layer: Any) -> dict[str, Tensor]:
        """Return what the layer's state dict holds of its weight, besides the packed values."""
        state = layer.weight.quant_state
        if state is None:  # not quantised before it is moved
            return {}
        return {
            f"weight.{name}": value
            for name, value in state.as_dict(packed=True).items()
        }

    @staticmethod
    def lora_values(layer: Any, weight: Any) -> Tensor:  # noqa: ARG004
        """Return the dequantised values of the packed weight."""
        if weight.quant_state is None:  # not quantised before it is moved
            return weight.detach()  # type: ignore[no-any-return]
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)


class LoRALinear8bit(LoRALinear4bit):
    """An 8-bit linear layer of bitsandbytes (Dettmers et al. 2022, "LLM.int8()") with a low-rank update."""

    lora_layer_types: ClassVar[LayerTypes] = (LINEAR_8BIT,)

    @staticmethod
    def lora_dtype(layer: Any, weight: Any) -> torch.dtype:  # noqa: ARG004
        """Return the dtype that the layer computes in."""
        return weight.dtype if weight.is_floating_point() else torch.float16

    @staticmethod
    def lora_entries(layer: Any) -> dict[str, Tensor]:
        """Return what the layer's state dict holds of its weight, besides the packed values."""
        if layer.weight.is_floating_point():
            return {}
        return {
            "SCB": _scales(layer),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    @staticmethod
    def lora_values(layer: Any, weight: Any) -> Tensor:
        """Return the dequantised values of the weight."""
        if weight.is_floating_point():
            return weight.detach()  # type: ignore[no-any-return]
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, _scales(layer))  # type: ignore[no-any-return]


def _scales(layer: Any) -> Tensor:
    """The scale of each row.

    The layer moves it from its weight to its state when it first runs.
    """
    at_weight: Tensor | None = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if at_weight is None else at_weight

"""Linear layers whose weights are quantised, with a low-rank update in full precision beside them (QLoRA)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.layers.base import LayerTypes, LoRALayer
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.parts import Part


class LoRALinear4bit(LoRALinear):
    r"""Compute what bitsandbytes does with a weight of four bits, and add :math:`s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: packed, of (out, in); lora_A: (r, in); lora_B: (out, r). Input (\*, in), output (\*, out).

    Source:
        Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3, equation 5.
    """

    lora_layer_types: ClassVar[LayerTypes] = ("bitsandbytes.nn.modules.Linear4bit",)
    lora_input = "x"
    lora_forward = LoRALayer.lora_forward  # the layer alone can read its weight

    @classmethod
    def lora_parts_of(cls, layer: Any) -> tuple[Part, ...]:
        """Return the one matrix that the packed weight stands for."""
        return (Part("weight", layer.in_features, layer.out_features, rows=layer.out_features),)

    @staticmethod
    def lora_is_quantised(layer: Any) -> bool:  # noqa: ARG004  # all of this type are
        """Whether no update can be merged into the layer's weight."""
        return True

    @staticmethod
    def lora_dtype(layer: Any, weight: Any) -> torch.dtype:
        """Return the dtype that the layer computes in."""
        stored = weight.dtype if weight.quant_state is None else weight.quant_state.dtype
        return layer.compute_dtype or stored  # type: ignore[no-any-return]

    @staticmethod
    def lora_values(layer: Any, weight: Any) -> Tensor:  # noqa: ARG004
        """Return the values that the packed weight stands for."""
        if weight.quant_state is None:  # it is quantised when it is moved
            return weight.detach()  # type: ignore[no-any-return]
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)

    @staticmethod
    def lora_as_weight(matrix: Tensor, weight: Tensor) -> Tensor:  # noqa: ARG004
        """Return the matrix: there is no other form that an update could have."""
        return matrix

    def lora_update(self, lora_A: Tensor, lora_B: Tensor, x: Tensor) -> Tensor:
        """Multiply by one factor after the other."""
        return super().lora_update(lora_A, lora_B, x)


class LoRALinear8bit(LoRALinear4bit):
    r"""Compute what bitsandbytes does with a weight of eight bits, and add :math:`s \, \mathrm{dropout}(x) A^T B^T`.

    Shape:
        weight: (out, in) of int8; lora_A: (r, in); lora_B: (out, r). Input (\*, in), output (\*, out).

    Source:
        Dettmers et al. 2023, section 3, on the layers of Dettmers et al. 2022, "LLM.int8()".
    """

    lora_layer_types: ClassVar[LayerTypes] = ("bitsandbytes.nn.modules.Linear8bitLt",)

    @staticmethod
    def lora_dtype(layer: Any, weight: Any) -> torch.dtype:  # noqa: ARG004
        """Return the dtype that the layer computes in."""
        return weight.dtype if weight.is_floating_point() else torch.float16

    @staticmethod
    def lora_values(layer: Any, weight: Any) -> Tensor:
        """Return the values that the weight and its scales stand for."""
        if weight.is_floating_point():
            return weight.detach()  # type: ignore[no-any-return]
        from bitsandbytes.functional import int8_vectorwise_dequant

        return int8_vectorwise_dequant(weight.data, _scales(layer))  # type: ignore[no-any-return]


def quantised_entries(module: nn.Module) -> dict[str, Tensor]:
    """Return what a quantised layer adds to its state dict beside its weight: scales and the like, part of the base."""
    weight: Any = module._parameters.get("weight")
    if _is_a(module, LoRALinear4bit) and weight.quant_state is not None:
        return {f"weight.{name}": value for name, value in weight.quant_state.as_dict(packed=True).items()}
    if _is_a(module, LoRALinear8bit) and not weight.is_floating_point():
        return {"SCB": _scales(module), "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return {}


def count(parameter: Any) -> int:
    """Return how many values a parameter stands for."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()  # type: ignore[no-any-return]


def repacks(module: nn.Module) -> bool:
    """Whether ``module`` would lay out its weight for inference as soon as it runs in eval mode, and then not train."""
    return "support_avx512bf16_for_cpu" in vars(module) and _is_a(module, LoRALinear4bit)


def unpack(module: Any) -> None:
    """Undo such a layout, if ``module`` has it, as bitsandbytes does for a state dict."""
    if repacks(module) and getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        module.state_dict()


def _is_a(module: nn.Module, kind: type[LoRALinear]) -> bool:
    return any(kind.lora_adapts(base) for base in type(module).__mro__)


def _scales(layer: Any) -> Tensor:
    """The scale of each row, which the layer moves from its weight to its state when it first runs."""
    at_weight: Tensor | None = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if at_weight is None else at_weight

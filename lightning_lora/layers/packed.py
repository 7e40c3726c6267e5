"""Questions on any module or parameter that may be quantised: its values are packed, and it has entries of its own."""

from typing import Any

from torch import Tensor, nn

from lightning_lora.layers.contract import dequantises, of_nearest_class
from lightning_lora.layers.each_kind.quantized import (
    LINEAR_4BIT,
    LINEAR_8BIT,
    LoRALinear4bit,
    LoRALinear8bit,
)
from lightning_lora.tensors.names import find_parameter

_KINDS: dict[str, type[LoRALinear4bit]] = {  # by the names of the layers' classes
    LINEAR_4BIT: LoRALinear4bit,
    LINEAR_8BIT: LoRALinear8bit,
}


def quantised_entries(module: nn.Module) -> dict[str, Tensor]:
    """Return the extra state dict entries of a quantised layer, such as its scales.

    They belong to the base.
    """
    kind = _kind_of(module)
    return {} if kind is None else kind.lora_entries(module)


def is_quantised(module: nn.Module, name: str) -> bool:
    """Whether a parameter that ``module`` itself holds is quantised."""
    parameter = find_parameter(module, name)
    if parameter is None:
        return False
    # a layer of bitsandbytes holds a float weight until it is moved to a device
    if name == "weight" and _kind_of(module) is not None:
        return not parameter.is_floating_point()
    return dequantises(parameter)


def number_of_values(parameter: Any) -> int:
    """Return the number of values that a parameter represents."""
    quant_state = getattr(parameter, "quant_state", None)
    if quant_state is None:
        return parameter.numel()  # type: ignore[no-any-return]
    return quant_state.shape.numel()  # type: ignore[no-any-return]


def repacks(module: nn.Module) -> bool:
    """Whether a 4-bit layer may repack its weight in eval mode, as on some CPUs: then it passes no gradient."""
    return (
        "support_avx512bf16_for_cpu" in vars(module)
        and _kind_of(module) is LoRALinear4bit
    )


def unpack(module: Any) -> None:
    """Undo the repacking for inference, as bitsandbytes itself does when a state dict is made."""
    if not (repacks(module) and _is_repacked(module)):
        return
    module.state_dict()
    state = module.weight.quant_state
    # bitsandbytes 0.50 leaves the scales as they were packed
    if state.absmax.dim() == 2:
        state.absmax = state.absmax.T.reshape(-1).float()


def _is_repacked(module: Any) -> bool:
    is_packed: bool = getattr(
        module.weight.quant_state, "packing_format_for_cpu", False
    )
    return is_packed


def _kind_of(module: nn.Module) -> type[LoRALinear4bit] | None:
    """The adapter class of a layer of bitsandbytes, or None."""
    return of_nearest_class(_KINDS, module)

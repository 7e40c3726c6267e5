"""What PEFT has: one table of our adapters and of PEFT's counterparts.

An adapter that is not in the table is refused, so a new one has to be put into it before it is written or read.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_lora.errors import listed
from lightning_lora.functional.factors import Factors
from lightning_lora.layers import kinds
from lightning_lora.layers.contract import full_name
from lightning_lora.storage.stored_layers import StoredLayer

Shape = tuple[int, ...]
Options = Mapping[str, Any]


def _as_they_are(factors: Factors, _: Shape, __: Options) -> Factors:
    """The factors as they are."""
    return factors


@dataclass(frozen=True)
class PeftLayer:
    """PEFT's counterpart of one of our adapters."""

    why_not: Callable[[StoredLayer], str]  # why PEFT computes something else for one such layer, or nothing
    to_peft: Callable[[Factors, Shape, Options], Factors] = _as_they_are  # our factors of a weight as PEFT has them
    from_peft: Callable[[Factors, Shape, Options], Factors] = _as_they_are  # PEFT's factors as ours
    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")  # the ends of the names of A and B
    is_parameter: bool = False  # whether PEFT wraps a parameter (target_parameters), not a layer


def why_not(layer: StoredLayer, magnitude: Tensor | None = None) -> str:
    """Return why PEFT has no counterpart for a layer's adapter, or one that computes something else. Or nothing."""
    counterpart = _PEFT_LAYERS.get(layer.adapter_class)
    if counterpart is None or _is_registered(layer.layer_class):
        return f"PEFT has no counterpart for our adapter of {_class_name(layer)}."
    other_names = layer.other_names
    if other_names:
        return f"the layer is used as {listed(other_names)} too, and PEFT would adapt the first use alone."
    if magnitude is not None and (magnitude == 0).any():  # the base has a row of zeros
        return "with use_dora, PEFT scales an output whose magnitude is zero by zero; here it is not scaled."
    return counterpart.why_not(layer)


def has_layer(kind: type[kinds.LoRALayer] | None) -> bool:
    """Return whether PEFT wraps layers that have this adapter here."""
    return kind in _PEFT_LAYERS and not _PEFT_LAYERS[kind].is_parameter


def has_counterpart(layer: StoredLayer) -> bool:
    """Return whether PEFT has a counterpart of a layer's adapter."""
    return layer.adapter_class in _PEFT_LAYERS


def peft_layer(layer: StoredLayer) -> PeftLayer:
    """Return PEFT's counterpart of a layer's adapter, after :func:`why_not`."""
    return _PEFT_LAYERS[layer.adapter_class]


def _class_name(layer: StoredLayer) -> str:
    """The name of the layer's class, for messages."""
    return layer.layer_class.rpartition(".")[2]


def _is_registered(layer_class: str) -> bool:
    """Whether a user has registered this class of layers."""
    if layer_class.startswith(("torch.", "transformers.", "bitsandbytes.")):
        return False
    registered = [full_name(layer_type) for layer_type in kinds.ADAPTERS if isinstance(layer_type, type)]
    return layer_class in registered


# Layers that add the update to their output


_COMPUTES_THE_SAME = "transformers.models.falcon.modeling_falcon.FalconLinear"  # its forward is x @ W.T + bias
_SCALED_EMBEDDING = re.compile(r"transformers\..*ScaledWordEmbedding")


def _why_not_added(layer: StoredLayer) -> str:
    """Why PEFT would compute something else around this layer's own forward."""
    if layer.is_additive or layer.layer_class == _COMPUTES_THE_SAME:
        return ""
    return f"{_class_name(layer)} has a forward of its own, and PEFT adds the update outside of it, with other results."


def _why_not_embedding(layer: StoredLayer) -> str:
    """As of other layers, but PEFT scales the update of a scaled embedding too."""
    if _SCALED_EMBEDDING.fullmatch(layer.layer_class):
        return ""
    return _why_not_added(layer)


# Convolutions


def _why_not_convolution(layer: StoredLayer) -> str:
    """Why PEFT fails with a convolution, or computes another one."""
    options = layer.options
    dilation = options.get("dilation", 1)  # one number, or one for each side
    if (torch.as_tensor(dilation) != 1).any():
        return f"it has dilation={dilation}, with which PEFT fails."
    padding_mode = options.get("padding_mode", "zeros")
    if padding_mode != "zeros":
        return f"it has padding_mode={padding_mode!r}, which PEFT ignores."
    groups = options.get("groups", 1)
    if groups > 1:
        return f"it has groups={groups}. PEFT's A reads the channels of all groups; here, those of one."
    return _why_not_added(layer)


def _with_kernel(factors: Factors, shape: Shape, _: Options) -> Factors:
    """A with the kernel's sides, B with sides of one."""
    a, b = factors
    ones = (1,) * (len(shape) - 2)
    a = a.view(-1, *shape[1:])
    b = b.view(*b.shape, *ones)
    return a, b


def _without_kernel(factors: Factors, _: Shape, __: Options) -> Factors:
    """Both as matrices."""
    a, b = factors
    return a.flatten(1), b.flatten(1)


# Attention


def _why_not_attention(layer: StoredLayer) -> str:
    """Why PEFT does not support an attention."""
    if layer.shapes.keys() <= {"in_proj_weight", "out_proj.weight"}:
        return ""
    return "PEFT does not support an attention with kdim or vdim."


# Parameters


def _why_not_parameters(layer: StoredLayer) -> str:
    """Why PEFT would not update each of these parameters wherever it is read."""
    for matrix in layer.matrices:
        if "." in matrix.weight:
            return f"{matrix.weight!r} belongs to a layer inside it. PEFT would update it only where that is called."
        if matrix.stack == (1,) and layer.options.get("is_transposed"):
            return "PEFT adds the update of one transposed expert the wrong way round."
    return ""


def _flattened_stack(factors: Factors, shape: Shape, options: Options) -> Factors:
    """A by experts, B with the expert running fastest. In a transposed stack, each weight is (in, out)."""
    if len(shape) == 2:
        return factors
    a, b = _turned(factors, options)
    b = b.permute(1, 2, 0)
    return a.flatten(0, 1), b.flatten(1)


def _unflattened_stack(factors: Factors, shape: Shape, options: Options) -> Factors:
    """The stacks of A and B again: the way back of :func:`_flattened_stack`."""
    if len(shape) == 2:
        return factors
    a, b = factors
    experts = math.prod(shape[:-2])
    a = a.reshape(experts, -1, a.shape[-1])
    b = b.reshape(len(b), -1, experts)
    b = b.permute(2, 0, 1)
    return _turned((a, b), options)


def _turned(factors: Factors, options: Options) -> Factors:
    """The factors of the transposed matrices, if the stack is transposed on one of the two sides."""
    if not options.get("is_transposed"):
        return factors
    a, b = factors
    return b.mT, a.mT


_PEFT_LAYERS: dict[type[kinds.LoRALayer] | None, PeftLayer] = {  # None: a user's own adapter
    kinds.LoRALinear: PeftLayer(_why_not_added),
    kinds.LoRALinear4bit: PeftLayer(_why_not_added),
    kinds.LoRALinear8bit: PeftLayer(_why_not_added),
    kinds.LoRAConv1D: PeftLayer(_why_not_added),
    kinds.LoRAEmbedding: PeftLayer(_why_not_embedding, keys=("lora_embedding_A", "lora_embedding_B")),
    kinds.LoRATokens: PeftLayer(_why_not_embedding),
    kinds.LoRAConvNd: PeftLayer(_why_not_convolution, to_peft=_with_kernel, from_peft=_without_kernel),
    kinds.LoRAAttention: PeftLayer(_why_not_attention),
    kinds.LoRARecurrent: PeftLayer(_why_not_parameters, is_parameter=True),
    kinds.LoRAParameters: PeftLayer(
        _why_not_parameters, to_peft=_flattened_stack, from_peft=_unflattened_stack, is_parameter=True
    ),
}

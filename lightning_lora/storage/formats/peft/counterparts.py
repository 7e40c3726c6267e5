"""PEFT's counterparts of our adapters: the table ``_COUNTERPARTS``, at the end.

Before it come the rules and the conversions that it names, by kinds of layers. An
adapter that is not in the table is refused, so a new one has to be put into it before
it is written or read.
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
from lightning_lora.storage.formats.peft.reasons import Reason, first_reason
from lightning_lora.storage.stored_layers import Shape, StoredLayer

Options = Mapping[str, Any]  # of a StoredLayer, such as the groups of a convolution


def _as_they_are(factors: Factors, _: Shape, __: Options) -> Factors:
    """The factors as they are."""
    return factors


@dataclass(frozen=True)
class Counterpart:
    """What PEFT has for one of our adapters."""

    # the rules by which PEFT computes something else for one such layer
    rules: tuple[Callable[[StoredLayer], Reason], ...]
    # from our factors of a weight, with its shape and the layer's options, to PEFT's
    to_peft: Callable[[Factors, Shape, Options], Factors] = _as_they_are
    # the way back
    from_peft: Callable[[Factors, Shape, Options], Factors] = _as_they_are
    # how the names of A and B end in PEFT's file
    keys: tuple[str, str] = ("lora_A.weight", "lora_B.weight")
    # whether PEFT wraps a parameter (target_parameters), not a layer
    is_parameter: bool = False


def counterpart_of(layer: StoredLayer) -> Counterpart:
    """Return PEFT's counterpart of a layer's adapter, if it has one."""
    return _COUNTERPARTS[layer.adapter_class]


def has_counterpart(layer: StoredLayer) -> bool:
    """Return whether PEFT has a counterpart of a layer's adapter."""
    return layer.adapter_class in _COUNTERPARTS


def wraps_layers_of(kind: type[kinds.LoRALayer] | None) -> bool:
    """Return whether PEFT wraps the layers that get this adapter here, and not their parameters."""
    return kind in _COUNTERPARTS and not _COUNTERPARTS[kind].is_parameter


def why_no_counterpart(layer: StoredLayer, magnitude: Tensor | None = None) -> Reason:
    """Return why PEFT has no counterpart for a layer's adapter, or one that computes something else."""
    return (
        _because_not_in_table(layer)
        or _because_used_in_several_places(layer)
        or _because_magnitude_is_zero(magnitude)
        or first_reason(counterpart_of(layer).rules, layer)
    )


def _because_not_in_table(layer: StoredLayer) -> Reason:
    """The adapter is not in the table, or the user has registered the class of the layer."""
    if has_counterpart(layer) and not _is_registered(layer.layer_class):
        return ""
    return f"PEFT has no counterpart for our adapter of {_class_name(layer)}."


def _because_used_in_several_places(layer: StoredLayer) -> Reason:
    """The model uses the layer in several places, under other names."""
    other_names = layer.other_names
    if other_names:
        return (
            f"the layer is used as {listed(other_names)} too, and PEFT would adapt the "
            "first use alone."
        )
    return ""


def _because_magnitude_is_zero(magnitude: Tensor | None) -> Reason:
    """DoRA has a magnitude of zero: the base has a row of zeros."""
    if magnitude is not None and (magnitude == 0).any():
        return (
            "with use_dora, PEFT scales an output whose magnitude is zero by zero; "
            "here it is not scaled."
        )
    return ""


def _class_name(layer: StoredLayer) -> str:
    """The name of the layer's class, for messages."""
    return layer.layer_class.rpartition(".")[2]


def _is_registered(layer_class: str) -> bool:
    """Whether a user has registered this class of layers."""
    if layer_class.startswith(("torch.", "transformers.", "bitsandbytes.")):
        return False
    registered = [
        full_name(layer_type)
        for layer_type in kinds.ADAPTERS
        if isinstance(layer_type, type)
    ]
    return layer_class in registered


# Layers that add the update to their output


# a Linear whose own forward computes the same: x @ W.T + bias
_COMPUTES_THE_SAME = "transformers.models.falcon.modeling_falcon.FalconLinear"
_SCALED_EMBEDDING = re.compile(r"transformers\..*ScaledWordEmbedding")


def _because_of_own_forward(layer: StoredLayer) -> Reason:
    """The layer's own forward would run without the update."""
    if layer.is_additive or layer.layer_class == _COMPUTES_THE_SAME:
        return ""
    return (
        f"{_class_name(layer)} has a forward of its own, and PEFT adds the update "
        "outside of it, with other results."
    )


def _because_of_own_lookup(layer: StoredLayer) -> Reason:
    """The embedding has a forward of its own.

    PEFT knows one: it scales the update of a scaled embedding too.
    """
    if _SCALED_EMBEDDING.fullmatch(layer.layer_class):
        return ""
    return _because_of_own_forward(layer)


# Convolutions


def _because_dilated(layer: StoredLayer) -> Reason:
    """The kernel has gaps."""
    dilation = layer.options.get("dilation", 1)  # one number, or one for each side
    if (torch.as_tensor(dilation) != 1).any():
        return f"it has dilation={dilation}, with which PEFT fails."
    return ""


def _because_of_padding_mode(layer: StoredLayer) -> Reason:
    """The sides are not padded with zeros."""
    padding_mode = layer.options.get("padding_mode", "zeros")
    if padding_mode != "zeros":
        return f"it has padding_mode={padding_mode!r}, which PEFT ignores."
    return ""


def _because_of_groups(layer: StoredLayer) -> Reason:
    """The channels are in several groups."""
    groups = layer.options.get("groups", 1)
    if groups > 1:
        return (
            f"it has groups={groups}. PEFT's A reads the channels of all groups; here, "
            "those of one."
        )
    return ""


def _with_kernel(factors: Factors, shape: Shape, _: Options) -> Factors:
    """A with the kernel's sides, and B with sides of one: (r, in, 3, 3) and (out, r, 1, 1) for a kernel of 3 by 3."""
    a, b = factors
    ones = (1,) * (len(shape) - 2)
    a = a.view(-1, *shape[1:])
    b = b.view(*b.shape, *ones)
    return a, b


def _without_kernel(factors: Factors, _: Shape, __: Options) -> Factors:
    """Both factors as matrices."""
    a, b = factors
    return a.flatten(1), b.flatten(1)


# Attention


def _because_of_kdim(layer: StoredLayer) -> Reason:
    """The attention has a weight of its own for each of q, k and v."""
    if layer.shapes.keys() <= {"in_proj_weight", "out_proj.weight"}:
        return ""
    return "PEFT does not support an attention with kdim or vdim."


# Parameters


def _because_read_elsewhere(layer: StoredLayer) -> Reason:
    """A parameter belongs to a layer inside of this one, which may read it without calling that layer."""
    for matrix in layer.matrices:
        if "." in matrix.weight:
            return (
                f"{matrix.weight!r} belongs to a layer inside it. PEFT would update it "
                "only where that is called."
            )
    return ""


def _because_one_transposed_expert(layer: StoredLayer) -> Reason:
    """A stack of transposed matrices has one matrix alone."""
    for matrix in layer.matrices:
        if matrix.stack == (1,) and layer.options.get("is_transposed"):
            return "PEFT adds the update of one transposed expert the wrong way round."
    return ""


def _flattened_stack(factors: Factors, shape: Shape, options: Options) -> Factors:
    """The factors of a stack of experts as two matrices.

    A has the rows of one expert after those of another. In B, the columns of all experts
    alternate: the expert runs fastest.
    """
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
    """The factors of the transposed matrices, if the stack has these: each of its weights is (in, out) then."""
    if not options.get("is_transposed"):
        return factors
    a, b = factors
    return b.mT, a.mT


_CONVOLUTION = (
    _because_dilated,
    _because_of_padding_mode,
    _because_of_groups,
    _because_of_own_forward,
)
_PARAMETERS = (_because_read_elsewhere, _because_one_transposed_expert)

# a user's own adapter has no class here: it is None, which is no key
_COUNTERPARTS: dict[type[kinds.LoRALayer] | None, Counterpart] = {
    kinds.LoRALinear: Counterpart((_because_of_own_forward,)),
    kinds.LoRALinear4bit: Counterpart((_because_of_own_forward,)),
    kinds.LoRALinear8bit: Counterpart((_because_of_own_forward,)),
    kinds.LoRAConv1D: Counterpart((_because_of_own_forward,)),
    kinds.LoRAEmbedding: Counterpart(
        (_because_of_own_lookup,), keys=("lora_embedding_A", "lora_embedding_B")
    ),
    kinds.LoRATokens: Counterpart((_because_of_own_lookup,)),
    kinds.LoRAConvNd: Counterpart(
        _CONVOLUTION, to_peft=_with_kernel, from_peft=_without_kernel
    ),
    kinds.LoRAAttention: Counterpart((_because_of_kdim,)),
    kinds.LoRARecurrent: Counterpart(_PARAMETERS, is_parameter=True),
    kinds.LoRAParameters: Counterpart(
        _PARAMETERS,
        to_peft=_flattened_stack,
        from_peft=_unflattened_stack,
        is_parameter=True,
    ),
}

"""Whether a kind of layer writes a matrix back into the weight as it reads the weight as a matrix."""

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from lightning_lora.layers.contract import LayerKind
from lightning_lora.layers.matrices import AdaptedMatrix
from lightning_lora.tensors.names import own_parameter

AsMatrix = Callable[[Tensor], Tensor]
AsWeight = Callable[[Tensor, Tensor], Tensor]


def why_merge_is_wrong(
    kind: type[LayerKind], layer: nn.Module, matrices: Iterable[AdaptedMatrix]
) -> str | None:
    """Return why an update would be merged wrongly, or None.

    ``lora_as_weight`` must undo ``lora_as_matrix``. Whoever defines one of them for a
    kind of one's own may forget the other, and no shape tells if the weight is square.
    So both are tried on random values.
    """
    as_matrix = kind.lora_as_matrix
    as_weight = kind.lora_as_weight
    if _is_ours(as_matrix) and _is_ours(as_weight):
        return None
    # its weight is packed, and nothing is merged into it
    if kind.lora_is_quantised(layer):
        return None
    for matrix in matrices:
        shape = tuple(own_parameter(layer, matrix.weight).shape)
        why = _why_not_the_same(as_matrix, as_weight, shape)
        if why is not None:
            return f"for its {matrix.weight} of shape {shape}, {why}"
    return None


def _is_ours(method: Callable[..., Tensor]) -> bool:
    return str(getattr(method, "__module__", "")).startswith("lightning_lora.")


@functools.cache  # once for each kind and shape
def _why_not_the_same(
    as_matrix: AsMatrix, as_weight: AsWeight, shape: tuple[int, ...]
) -> str | None:
    """Say what a weight becomes as a matrix and back, if it is not the same weight."""
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    tried = "lora_as_weight(lora_as_matrix(W), W)"
    try:
        found = as_weight(as_matrix(weight), weight)
    except Exception as error:  # code of a user
        return f"{tried} ends in {type(error).__name__}: {error}"
    found_shape = tuple(getattr(found, "shape", ()))
    if not isinstance(found, Tensor) or found_shape != shape:
        return f"{tried} has the shape {found_shape}"
    if not torch.allclose(found.to(weight), weight):
        return f"{tried} is not W"
    return None

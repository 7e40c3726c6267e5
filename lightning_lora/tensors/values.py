"""Values of tensors: copy, replace, compare and hash them.

The other packages read and replace weights with these functions.
"""

import functools

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements whose products stay in a cache


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy in CPU memory.

    The copy of a meta tensor, which has no values, stays on the meta device.
    """
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def replace_values(tensor: Tensor, values: Tensor) -> None:
    """Replace the values of a tensor.

    It stays the same object, and nothing is copied.
    """
    tensor.data = values


def set_requires_grad(tensor: Tensor, flag: bool) -> None:
    """Set ``requires_grad``, also of a tensor made in ``torch.inference_mode``."""
    if tensor.requires_grad != flag:
        with torch.inference_mode(tensor.is_inference()):
            tensor.requires_grad_(flag)


def same_bits(tensor: Tensor, original: Tensor) -> bool:
    """Whether two tensors have the same bits.

    ``original`` is converted to the dtype of ``tensor`` first.

    Example:
        >>> same_bits(torch.ones(2), torch.ones(2, dtype=torch.float64)), same_bits(torch.ones(2), torch.ones(3))
        (True, False)
    """
    if tensor.is_meta or original.is_meta:
        return tensor.is_meta and original.is_meta
    return tensor.shape == original.shape and digest(tensor.cpu()) == digest(original.to(tensor.dtype))


def digest(tensor: Tensor) -> int:
    """Return a 63-bit hash of the tensor's bits.

    The bytes are read as integers of at most 32 bits. Each is multiplied by an odd number that depends on its position,
    and all products are summed. A change of one element always changes the sum. Other changes go unnoticed with a
    probability of about ``2**-63``. The cost is about one pass over the tensor. It guards against mistakes, not against
    forged weights.

    Example:
        >>> digest(torch.zeros(3)) == digest(torch.zeros(3)), digest(torch.ones(3)) == digest(torch.zeros(3))
        (True, False)
    """
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor that consists of others, such as a quantised one
        total = 0
        for name in tensor.__tensor_flatten__()[0]:
            total = (3 * total + digest(getattr(tensor, name))) % (1 << 63)
        return total
    if tensor.layout is not torch.strided:
        sparse = tensor.detach().to_sparse_coo().coalesce()  # the dense form may be too large
        return (3 * digest(sparse.indices()) + digest(sparse.values())) % (1 << 63)
    bits = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    integers = bits.view({1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32))
    multipliers = _multipliers(tensor.device)
    total = integers.numel()
    for place, chunk in enumerate(integers.split(_CHUNK)):
        total += int((chunk * multipliers[: chunk.numel()]).sum()) * int(multipliers[-1 - place])
    return total % (1 << 63)


@functools.cache
def _multipliers(device: torch.device) -> Tensor:
    """Odd 64-bit numbers for the positions in a chunk, as good as random.

    Source:
        Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", section 5 (SplitMix64's mixing function).
    """
    mixed = torch.arange(1, _CHUNK + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 31)) | 1

"""Tell tensors apart by what is in them, at the cost of about one pass over them."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 18  # elements whose products stay in a cache


def digest(tensor: Tensor) -> int:
    """Return 63 bits that tell two tensors' contents apart, bit for bit, and cost about one pass over them.

    The bytes are read as integers of at most 32 bits and summed, each times an odd multiplier that is drawn for its
    place: a change of any one element always changes the sum, and other changes escape with a probability of about
    ``2**-63``. It guards against mistakes, not against someone who forges weights.

    Example:
        >>> digest(torch.zeros(3)) == digest(torch.zeros(3)), digest(torch.ones(3)) == digest(torch.zeros(3))
        (True, False)
    """
    if hasattr(tensor, "__tensor_flatten__"):  # a tensor of others, such as a quantised one
        total = 0
        for name in tensor.__tensor_flatten__()[0]:
            total = (3 * total + digest(getattr(tensor, name))) % (1 << 63)
        return total
    if tensor.layout is not torch.strided:
        sparse = tensor.detach().to_sparse_coo().coalesce()  # whose dense form may be too large
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
    """Odd numbers of 64 bits for the places in a chunk, as good as drawn at random.

    Source:
        Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators", section 5 (the finishing of SplitMix64).
    """
    mixed = torch.arange(1, _CHUNK + 1, device=device) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    return (mixed ^ (mixed >> 31)) | 1


@dataclass
class Seen:
    """A weight as it was: where it lay, torch's count of its changes, and a digest of some of its values."""

    place: int
    version: int
    dtype: torch.dtype
    some: int

    @classmethod
    def of(cls, weight: Tensor) -> "Seen":
        """Look at a weight."""
        some = weight.detach().reshape(-1)[:: weight.numel() // 1024 + 1]
        version = 0 if weight.is_inference() else weight._version
        return cls(weight.data_ptr(), version, weight.dtype, 0 if weight.is_meta else digest(some))

    def differs(self, weight: Tensor) -> bool:
        """Whether the weight was changed since; moving and converting it is no change."""
        now = Seen.of(weight)
        counted = self.place == now.place and self.version != now.version
        return counted or (self.dtype == now.dtype and self.some != now.some and not weight.is_meta)

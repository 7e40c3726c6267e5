"""Values of tensors: copy, replace, compare and hash them.

The other packages read and replace weights with these functions.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

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

    It stays the same object. Nothing is copied, except for a tensor that was made in inference mode.
    """
    if tensor.is_inference() and not values.is_inference():  # or torch would miss a version counter in every use
        with torch.inference_mode():
            values = values.clone()
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
    return _digest_of_integers(_integers(tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)))


def digests_as(tensor: Tensor, dtypes: Sequence[torch.dtype]) -> list[int]:
    """Return a floating-point tensor's digests in other dtypes.

    Values are converted a chunk at a time, in one walk over the tensor. So no copy of it is made.

    Example:
        >>> third = torch.tensor([1 / 3])
        >>> digests_as(third, [torch.bfloat16]) == [digest(third.bfloat16())]
        True
    """
    if tensor.layout is not torch.strided or hasattr(tensor, "__tensor_flatten__") or not tensor.numel():
        return [digest(tensor.to(dtype)) for dtype in dtypes]
    sums, counts = {dtype: list[Tensor]() for dtype in dtypes}, dict.fromkeys(dtypes, 0)
    for chunk in tensor.detach().contiguous().reshape(-1).split(_CHUNK):
        for dtype in dtypes:
            integers = _integers(chunk.to(dtype))
            sums[dtype] += _sums(integers)
            counts[dtype] += integers.numel()
    return [_total(sums[dtype], counts[dtype]) for dtype in dtypes]


def _integers(values: Tensor) -> Tensor:
    """The bits of a vector, as integers of at most 32 bits."""
    return values.view({1: torch.uint8, 2: torch.int16}.get(values.element_size(), torch.int32))


def _digest_of_integers(integers: Tensor) -> int:
    """The hash of a vector of integers. A device is waited for once."""
    return _total(_sums(integers), integers.numel()) if integers.numel() else 0


def _sums(integers: Tensor) -> list[Tensor]:
    """The sum of products of each chunk."""
    multipliers = _multipliers(integers.device)
    return [_sum_of_products(chunk, multipliers[: chunk.numel()]) for chunk in integers.split(_CHUNK)]


def _total(sums: list[Tensor], count: int) -> int:
    """The hash of ``count`` integers with these sums of their chunks."""
    total = (torch.stack(sums) * _multipliers(sums[0].device)[-len(sums) :].flip(0)).sum()
    return (count + int(total)) % (1 << 63)


def _sum_of_products(integers: Tensor, multipliers: Tensor) -> Tensor:
    """The sum modulo 2**64. On a CPU, ``dot`` is a third faster; other devices have none for integers."""
    if integers.device.type == "cpu":
        return torch.dot(integers.long(), multipliers)
    return (integers * multipliers).sum()


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


# Tensors as they were

_SAMPLES = 1024


def look(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return what can be seen of a tensor quickly.

    That is its address, version, device, dtype, shape and about a thousand values. Two looks differ after almost every
    change. Code that writes through ``.data``, numpy or torch.distributed changes no version: such a change is missed
    if it also misses every sample. It is None for tensors that must be read in full.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [look(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return None if None in inner else (None, tensor._version, *inner)
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_inference():
        return None
    form = (str(tensor.device), tensor.dtype, tuple(tensor.shape))
    return tensor.data_ptr(), tensor._version, *form, digest(_samples(tensor))


def _samples(tensor: Tensor) -> Tensor:
    """About a thousand values, at the same places however the tensor lies in memory."""
    values = tensor.detach()
    step = values.numel() // _SAMPLES + 1
    while values.dim() and math.gcd(step, values.shape[-1] or 1) > 1:  # or it would meet some columns only
        step += 1
    if values.is_contiguous():
        return values.reshape(-1)[::step]
    places = torch.arange(0, values.numel(), step, device=values.device)
    return values[torch.unravel_index(places, values.shape)]


class Seen:
    """A tensor as it was at one moment.

    It knows the tensor itself, but not by a weak reference: torch refuses to swap tensors that have one. A copy of it
    (by deepcopy or pickle) knows only the values.

    Example:
        >>> weight = torch.ones(3)
        >>> seen = Seen(weight)
        >>> before = seen.is_still(weight)
        >>> _ = weight.mul_(2)
        >>> before, seen.is_still(weight)
        (True, False)
    """

    def __init__(self, tensor: Tensor, known: int | None = None) -> None:
        self._tensor: Tensor | None = tensor
        self._look = look(tensor)
        self._some = None if self._look is None or self._look[0] is None else _samples(tensor).to("cpu", copy=True)
        self._digest = known
        self.dtype = tensor.dtype

    def is_unchanged(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, without visible change."""
        return tensor is self._tensor and self._look is not None and self._look == look(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the same values.

        It may have moved to another device.
        """
        if tensor.is_meta or tensor.dtype != self.dtype:
            return False
        if self._is_kept(tensor):
            return True
        known = self.digest()
        return known is not None and known == digest(tensor)

    def is_alike(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the same values, if they are known.

        It may have been moved or converted: then about a thousand values are compared.
        """
        if tensor.is_meta or self.is_still(tensor):
            return True
        if self._some is None or hasattr(tensor, "__tensor_flatten__"):
            return self.dtype != tensor.dtype or self._digest is None
        if tensor.dtype == self.dtype and self._digest is not None:
            return False
        return digest(_samples(tensor).cpu()) == digest(self._some.to(tensor.dtype))

    def _is_kept(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, without visible change, here or on another device."""
        return self.is_unchanged(tensor) or (tensor is self._tensor and self._has_moved(tensor))

    def _has_moved(self, tensor: Tensor) -> bool:
        """Whether the tensor is on another device, not written to since, with the same sampled values."""
        now, then = look(tensor), self._look
        if now is None or then is None or then[0] is None:  # tensors inside it may have changed
            return False
        return now[2] != then[2] and (now[1], *now[3:]) == (then[1], *then[3:])

    def digest(self) -> int | None:
        """Return the digest of the values at that moment.

        It is computed when it is first asked for. If the values have changed before that, it is None.
        """
        if self._digest is None and self._tensor is not None and self._is_kept(self._tensor):
            self._digest = digest(self._tensor)
        return self._digest

    def __getstate__(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "_tensor": None, "_look": None, "_some": self._some, "_digest": self.digest()}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Seen":
        """Return a copy that knows only the values.

        Args:
            state: What ``__getstate__`` returned.
        """
        seen = cls.__new__(cls)
        vars(seen).update(state)
        return seen

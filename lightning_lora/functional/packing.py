"""Packed copies of a frozen weight.

Torch's library for CPUs, oneDNN, computes with weights in a layout of its own. Torch brings a weight into this layout
in every call. The weight of a frozen layer does not change, so this can be done once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pack = Callable[[Tensor], tuple[Tensor, Tensor]]

_SAMPLES = 64


class _Entry(NamedTuple):
    """What was packed, and what the weight was then.

    It keeps the weight's memory, so that no other tensor can have this address and be taken for the weight.
    """

    weight: Tensor
    seen: tuple[Any, ...]
    some: Tensor
    copies: tuple[Tensor, ...]


class PackedWeight:
    """A weight in oneDNN's layout, for both passes.

    It is empty at first. The copies are made at the first use, and again after the weight has changed or moved. Code
    that writes through ``.data`` or numpy hides the change from torch. It is noticed if it reaches one of some sixty
    values, spread over the weight.

    A copy, by deepcopy or pickle, is None. So no file and no copy of a model holds packed weights. Several threads may
    use one object: each gets the copies of the weight that it gave.

    Example:
        >>> import copy
        >>> weight, packed, calls = torch.ones(2, 2), PackedWeight(), []
        >>> def pack(matrix):
        ...     calls.append(1)
        ...     return matrix, matrix.T
        >>> for _ in range(2):
        ...     forward, backward = packed.copies(weight, torch.bfloat16, pack)
        >>> len(calls), forward.dtype, copy.deepcopy(packed)
        (1, torch.bfloat16, None)
    """

    def __init__(self) -> None:
        self.clear()

    @property
    def is_filled(self) -> bool:
        """Whether there are copies now."""
        return self._entry is not None

    @property
    def nbytes(self) -> int:
        """The size of the copies in bytes."""
        return sum(_size(copy) for copy in self._entry.copies) if self._entry else 0

    def clear(self) -> None:
        """Free the copies."""
        self._entry: _Entry | None = None

    def copies(self, weight: Tensor, dtype: torch.dtype, pack: Pack) -> tuple[Tensor, ...]:
        """Return the copies for both passes.

        Args:
            weight: The weight, for which :func:`can_be_packed` is true.
            dtype: The dtype to compute in.
            pack: Makes the copies for the forward and for the backward pass, given the weight in this dtype.
        """
        seen = (weight.data_ptr(), weight._version, weight.shape, weight.stride(), weight.dtype, dtype)
        entry = self._entry
        if entry is None or entry.seen != seen or not torch.equal(_samples(weight), entry.some):
            self.clear()
            entry = None  # the old copies, before there are new ones
            with torch.no_grad():
                copies = pack(weight.detach().to(dtype))
            entry = self._entry = _Entry(weight.detach(), seen, _samples(weight).clone(), copies)
        return entry.copies

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def can_be_packed(weight: Tensor) -> bool:
    """Whether a weight is frozen and without gaps in memory."""
    return (
        not weight.requires_grad
        and not weight.is_inference()
        and (weight.is_contiguous() or (weight.dim() == 2 and weight.T.is_contiguous()) or _is_channels_last(weight))
    )


def _is_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)


def _size(copy: Tensor) -> int:
    return int(torch.ops.mkldnn._nbytes(copy)) if copy.is_mkldnn else copy.nbytes


def _samples(weight: Tensor) -> Tensor:
    """Some values of a weight, in the order in which they lie in memory."""
    values = weight.detach().as_strided((weight.numel(),), (1,))
    return values[:: weight.numel() // _SAMPLES + 1]

"""The comparison of a base with a fingerprint, tensor by tensor: the same bits, or converted to another precision."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_lora.base.fingerprints import (
    HalfDigests,
    StoredFingerprint,
    digests_by_name,
    quantised_in,
)
from lightning_lora.base.readings import HALF_DTYPES
from lightning_lora.storage.same_base.compared_tensors import is_convertible
from lightning_lora.tensors.dicts import only
from lightning_lora.tensors.digests import digests_as


@dataclass
class ComparedTensor:
    """A tensor of the base at hand, to be compared with its digests in a fingerprint."""

    name_here: str  # in the base
    name_there: str  # in the fingerprint
    tensor: Tensor
    digest: int
    compute_half_digests: Callable[[], Sequence[int]]  # only some comparisons need them
    is_quantised: bool = False


@dataclass
class Comparison:
    """What a comparison of the base at hand with a fingerprint has found.

    Tensors are named as in the base.
    """

    fingerprint: StoredFingerprint
    has_same_form: bool = False  # so all bits must be the same
    equal: int = 0  # how many tensors are the same, converted or not
    # the same tensors in another precision
    converted: list[str] = field(default_factory=list)
    # tensors with other values, and those that only one of the bases has
    differ: list[str] = field(default_factory=list)
    # the quantised tensors that were not compared
    quantised: list[str] = field(default_factory=list)

    @property
    def compared(self) -> int:
        """How many tensors were compared."""
        return self.equal + len(self.differ)

    @property
    def is_same_base(self) -> bool:
        """Whether some tensors were compared, and none differs."""
        return not self.differ and self.equal > 0

    @property
    def is_converted(self) -> bool:
        """Whether the same base is in another precision, as far as tensors were compared."""
        return bool(self.converted or self.quantised)


class BaseThere:
    """The base that a fingerprint in a file was taken of, by the names of its tensors in the file."""

    def __init__(
        self, fingerprint: StoredFingerprint, names: Iterable[str] = ()
    ) -> None:
        """Read a fingerprint.

        Its entry ``rounded`` has the names of its tensors, in the order of its digests,
        and ``names`` is not used. Without this entry, no half digests are known, and
        ``names`` must be the names of all tensors, in the order of the digests.
        """
        unknown: HalfDigests = dict.fromkeys(names, ())
        self.fingerprint = fingerprint
        self.half_digests = fingerprint.get("rounded", unknown)
        names_in_order = self.half_digests.keys()
        self.digests = digests_by_name(names_in_order, fingerprint)
        self.quantised = quantised_in(fingerprint)
        self.floating_dtypes = _floating_dtypes(fingerprint["dtypes"])

    def has_same_bits(self, here: ComparedTensor) -> bool:
        """Whether a tensor here has the bits of the one there."""
        return self.digests.get(here.name_there) == here.digest

    def has_converted(self, here: ComparedTensor) -> bool:
        """Whether one of two tensors is the other, converted to another floating-point dtype."""
        if here.name_there not in self.digests or not is_convertible(here.tensor):
            return False
        return self._became(here) or self._came_from(here)

    def _became(self, here: ComparedTensor) -> bool:
        """Whether the tensor there, converted to half precision, is the one here: by the half digests in the file."""
        half_digests = self.half_digests[here.name_there]
        if not half_digests or here.tensor.dtype not in HALF_DTYPES:
            return False
        return here.digest == half_digests[HALF_DTYPES.index(here.tensor.dtype)]

    def _came_from(self, here: ComparedTensor) -> bool:
        """Whether the tensor here, converted to a dtype there, is the one there: by digests of its conversions.

        The half digests may be known already, so they come first. Both are looked at, also
        if only one of their dtypes is there: digests do not match by chance.
        """
        digest_there = self.digests[here.name_there]
        other_dtypes = self.floating_dtypes - {here.tensor.dtype}
        half_dtypes = other_dtypes.intersection(HALF_DTYPES)
        if half_dtypes and digest_there in here.compute_half_digests():
            return True
        remaining_dtypes = list(other_dtypes - half_dtypes)
        return digest_there in digests_as(here.tensor, remaining_dtypes)


def _floating_dtypes(names: Iterable[str]) -> set[torch.dtype]:
    """The floating-point dtypes with these names. A later torch has more."""
    dtypes = only(vars(torch), set(names)).values()
    return {dtype for dtype in dtypes if dtype.is_floating_point}


def compare(
    there: BaseThere,
    tensors: Iterable[ComparedTensor],
    *,
    only_there: Iterable[str] = (),
    has_same_form: bool = False,
) -> Comparison:
    """Compare the base at hand with the one of a fingerprint, tensor by tensor.

    Args:
        there: The base of the fingerprint.
        tensors: The tensors of the base at hand.
        only_there: The names of tensors that the base at hand lacks: these differ.
        has_same_form: Whether both have the same form. Only then are quantised tensors
            compared: otherwise, other bits may mean the same weights.
    """
    found = Comparison(there.fingerprint, has_same_form, differ=list(only_there))
    for tensor in tensors:
        is_quantised = tensor.is_quantised or tensor.name_there in there.quantised
        if is_quantised and not has_same_form:
            found.quantised.append(tensor.name_here)
        elif there.has_same_bits(tensor):
            found.equal += 1
        elif there.has_converted(tensor):
            found.equal += 1
            found.converted.append(tensor.name_here)
        else:
            found.differ.append(tensor.name_here)
    return found

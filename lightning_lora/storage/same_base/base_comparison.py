"""The comparison of a base with a fingerprint, tensor by tensor: the same bits, or converted to another precision."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_lora.base.fingerprints import HalfDigests, StoredFingerprint, digests_by_name
from lightning_lora.base.readings import HALF_DTYPES
from lightning_lora.storage.same_base.compared_tensors import is_convertible
from lightning_lora.tensors.dicts import only, with_values
from lightning_lora.tensors.digests import digests_as


@dataclass
class ComparedTensor:
    """A tensor of a base, to be compared with its digests in a fingerprint."""

    name: str  # its name in the fingerprint
    title: str  # its name in the base at hand
    tensor: Tensor
    exact: int  # the digest of its bits
    halves: Callable[[], Sequence[int]]  # returns its digests in bfloat16 and float16
    is_quantised: bool = False


@dataclass
class Comparison:
    """What a comparison of a base with a fingerprint has found: names of tensors, and how many are the same."""

    differ: list[str] = field(default_factory=list)  # also those that only one of them has
    converted: list[str] = field(default_factory=list)  # the same in another precision
    equal: int = 0  # converted or not
    quantised: list[str] = field(default_factory=list)  # not compared
    is_same_form: bool = False  # whether the base has the same form, so that all bits must be the same

    @property
    def is_same(self) -> bool:
        """Whether it is the same base."""
        return not self.differ and self.equal > 0

    @property
    def has_same_bits(self) -> bool:
        """Whether all tensors of the same base were compared, and none is converted."""
        return not self.converted and not self.quantised


def compare(stored: StoredFingerprint, tensors: Iterable[ComparedTensor], *, is_same_form: bool = False) -> Comparison:
    """Compare a base with one fingerprint, tensor by tensor."""
    there = _BaseThere(stored)
    found = Comparison(is_same_form=is_same_form)
    for tensor in tensors:
        is_left_out = tensor.is_quantised or tensor.name in there.quantised
        if is_left_out and not is_same_form:
            found.quantised.append(tensor.title)
        elif there.has_same_bits(tensor):
            found.equal += 1
        elif there.has_converted(tensor):
            found.equal += 1
            found.converted.append(tensor.title)
        else:
            found.differ.append(tensor.title)
    return found


class _BaseThere:
    """The base that a fingerprint was taken of, by the names of its tensors."""

    def __init__(self, stored: StoredFingerprint) -> None:
        """Read a fingerprint that says which names it has."""
        self.halves: HalfDigests = stored["rounded"]
        self.quantised = with_values(self.halves, [None])
        self.digests = digests_by_name(self.halves, stored)
        self.floating_dtypes = _floating_dtypes(stored["dtypes"])

    def has_same_bits(self, here: ComparedTensor) -> bool:
        """Whether a tensor is there, bit by bit."""
        return self.digests.get(here.name) == here.exact

    def has_converted(self, here: ComparedTensor) -> bool:
        """Whether one of two tensors is the other, converted to another floating-point dtype."""
        if here.name not in self.digests or not is_convertible(here.tensor):
            return False
        return self._became(here) or self._came_from(here)

    def _became(self, here: ComparedTensor) -> bool:
        """Whether the tensor there, converted to half precision, is the one here."""
        halves = self.halves[here.name]
        if not halves or here.tensor.dtype not in HALF_DTYPES:
            return False
        return here.exact == halves[HALF_DTYPES.index(here.tensor.dtype)]

    def _came_from(self, here: ComparedTensor) -> bool:
        """Whether the tensor here, converted to a dtype there, is the one there."""
        digest_there = self.digests[here.name]
        other_dtypes = self.floating_dtypes - {here.tensor.dtype}
        other_halves = other_dtypes.intersection(HALF_DTYPES)
        if other_halves and digest_there in here.halves():
            return True
        return digest_there in digests_as(here.tensor, list(other_dtypes - other_halves))


def _floating_dtypes(names: Iterable[str]) -> set[torch.dtype]:
    """The floating-point dtypes with these names. A later torch has more."""
    dtypes = only(vars(torch), set(names)).values()
    return {dtype for dtype in dtypes if dtype.is_floating_point}

"""Tensors as they were at one moment: has code changed their values since?"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.private import version_of
from lightning_lora.tensors.digests import digest, holds_inner_tensors, inner_tensors
from lightning_lora.tensors.shards import to_local

_SAMPLES = 1024


@dataclass(frozen=True)
class Look:
    """What can be seen of a tensor quickly.

    Two looks differ after almost every change.
    """

    address: int
    version: int  # how often it was written in place
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    samples: int  # the digest of about a thousand values


@dataclass(frozen=True)
class LookInside:
    """What can be seen quickly of a tensor that holds its values in others."""

    version: int
    inner: "list[AnyLook]"


class Unseen:
    """A look at a tensor of which nothing can be seen quickly. It equals no other look."""


AnyLook = Look | LookInside | Unseen


def _was_only_moved(earlier: AnyLook | None, now: AnyLook) -> bool:
    """Whether a tensor was moved to another device, and not written to.

    A look at a tensor that holds others does not tell, so the answer is no.
    """
    if not isinstance(earlier, Look) or not isinstance(now, Look):
        return False
    if now.device == earlier.device:
        return False
    return now == replace(earlier, address=now.address, device=now.device)


def look(tensor: Tensor) -> AnyLook:
    """Look at a tensor: address, version, device, dtype, shape and about a thousand values.

    Code that writes through ``.data``, numpy or torch.distributed, and a fused
    optimizer, change no version: such a change is missed if it also misses every
    sample.
    """
    if holds_inner_tensors(tensor):
        inner_looks = [look(inner) for inner in inner_tensors(tensor)]
        return LookInside(version_of(tensor), inner_looks)
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_inference():
        return Unseen()
    return Look(
        address=tensor.data_ptr(),
        version=version_of(tensor),
        device=str(tensor.device),
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        samples=digest(samples(tensor)),
    )


def samples(tensor: Tensor) -> Tensor:
    """Return about a thousand values, at the same places however the tensor lies in memory."""
    values = tensor.detach()
    step = _step_between_samples(values)
    if values.is_contiguous():
        return values.reshape(-1)[::step]
    places = torch.arange(0, values.numel(), step, device=values.device)
    return values[torch.unravel_index(places, values.shape)]


def _step_between_samples(values: Tensor) -> int:
    """How many values lie between two samples.

    It shares no factor with the number of columns. Otherwise, the samples would be in
    some of the columns alone, and a change of the others would be missed.
    """
    step = values.numel() // _SAMPLES + 1
    columns = max(1, values.shape[-1:].numel())
    while math.gcd(step, columns) > 1:
        step += 1
    return step


class Seen:
    """A tensor, or the local shard of a DTensor, as it was at one moment.

    A copy or a pickle of this knows only the values. Three questions can be asked of a
    tensor that is given later. If its values are the same, but it is another tensor, or
    on another device, or in another dtype, their answers are:

    =========================  ==============  ==============  =============  ==============================
    question                   another tensor  another device  another dtype  what is looked at
    =========================  ==============  ==============  =============  ==============================
    ``is_unchanged``           no              no              no             what is seen quickly
    ``has_same_values``        yes             yes             no             all values, where needed
    ``may_have_same_values``   yes             yes             yes            about a thousand, if converted
    =========================  ==============  ==============  =============  ==============================
    """

    def __init__(self, tensor: Tensor, known_digest: int | None = None) -> None:
        local = to_local(tensor)
        self.dtype = local.dtype
        # no weak reference: torch refuses to swap tensors with one
        self._tensor: Tensor | None = tensor
        self._look = look(local)
        self._samples = (
            samples(local).to("cpu", copy=True)
            if isinstance(self._look, Look)
            else None
        )
        self._digest = known_digest

    def is_unchanged(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, on the same device, without visible change."""
        return tensor is self._tensor and self._look == look(to_local(tensor))

    def has_same_values(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the same values in the same dtype.

        One on the meta device has none.
        """
        if tensor.is_meta or tensor.dtype != self.dtype:
            return False
        if self._is_unchanged_or_moved(tensor):
            return True
        digest_then = self.digest()
        return digest_then is not None and digest_then == digest(to_local(tensor))

    def may_have_same_values(self, tensor: Tensor) -> bool:
        """Whether nothing shows that ``tensor`` has other values: on the meta device, nothing does."""
        if tensor.is_meta or self.has_same_values(tensor):
            return True
        local = to_local(tensor)
        # has_same_values has compared all values, if the dtype is the same and there is a
        # digest of the earlier values
        all_values_were_compared = (
            local.dtype == self.dtype and self.digest() is not None
        )
        if all_values_were_compared:
            return False
        if self._samples is None or holds_inner_tensors(local):
            return True
        return digest(samples(local).cpu()) == digest(self._samples.to(local.dtype))

    def _is_unchanged_or_moved(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, without visible change, here or on another device."""
        if tensor is not self._tensor:
            return False
        now = look(to_local(tensor))
        return now == self._look or _was_only_moved(self._look, now)

    def digest(self) -> int | None:
        """Return the digest of the values at that moment, or None if they changed before anyone asked for it."""
        if (
            self._digest is None
            and self._tensor is not None
            and self._is_unchanged_or_moved(self._tensor)
        ):
            self._digest = digest(to_local(self._tensor))
        return self._digest

    def __getstate__(self) -> dict[str, Any]:
        known = {
            "dtype": self.dtype,
            "_samples": self._samples,
            "_digest": self.digest(),
        }
        return {**known, "_tensor": None, "_look": None}

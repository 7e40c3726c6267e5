"""Values of tensors: copy, replace and compare them."""

import math
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_lora.private import version_of
from lightning_lora.tensors.digests import consists_of_others, digest, inner_tensors
from lightning_lora.tensors.shards import is_dtensor, to_local


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a value is a tensor: a state may hold others."""
    return isinstance(value, Tensor)


def detached(value: Any) -> Any:
    """Return a tensor without its graph, or another value as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy in CPU memory. A tensor without values stays on the meta device."""
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def replace_values(tensor: Tensor, values: Tensor) -> None:
    """Replace the values of a tensor, which stays the same object. Nothing is copied, but to a DTensor."""
    if is_dtensor(tensor):
        _replace_spread_values(tensor, values)
        return
    if tensor.is_inference() and not values.is_inference():  # or torch would miss a version counter in every use
        with torch.inference_mode():
            values = values.clone()
    tensor.data = values


def _replace_spread_values(tensor: Tensor, values: Tensor) -> None:
    shard = to_local(tensor)
    new_shard = to_local(values)
    if tensor.dtype == values.dtype and shard.shape == new_shard.shape:
        shard.copy_(new_shard)  # FSDP2 sends this memory to the other processes
    else:
        torch.utils.swap_tensors(tensor, nn.Parameter(values, tensor.requires_grad))


def set_aside(tensor: Tensor) -> Tensor:
    """Return values to keep, in CPU memory, before :func:`replace_values`. They are copied only if necessary."""
    if is_dtensor(tensor):
        return copy_to_host(tensor)
    values = tensor.data.cpu()
    is_view = values.untyped_storage().nbytes() > values.nbytes  # of a larger memory, which others may reuse
    return values.clone() if is_view else values


def set_requires_grad(tensor: Tensor, flag: bool) -> None:
    """Set ``requires_grad``, also of a tensor made in ``torch.inference_mode``."""
    with torch.inference_mode(tensor.is_inference()):
        tensor.requires_grad_(flag)


def same_bits(tensor: Tensor, original: Tensor) -> bool:
    """Whether two tensors have the same bits in the first one's dtype. Of a DTensor, the local shard is compared."""
    tensor, original = to_local(tensor), to_local(original)
    if tensor.is_meta or original.is_meta:
        return tensor.is_meta == original.is_meta
    return tensor.shape == original.shape and digest(tensor.cpu()) == digest(original.to(tensor.dtype))


# Tensors as they were

_SAMPLES = 1024


@dataclass(frozen=True)
class Look:
    """What can be seen of a tensor quickly. Two looks differ after almost every change."""

    address: int
    version: int  # how often it was written in place
    device: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    samples: int  # the digest of about a thousand values

    def is_of_a_moved_tensor(self, earlier: "Look") -> bool:
        """Whether the tensor was moved to another device since, and not written to."""
        return self.device != earlier.device and self == replace(earlier, address=self.address, device=self.device)


def _was_only_moved(earlier: object, now: object) -> bool:
    """Whether a tensor is on another device, not written to. Of tensors inside one, nothing tells that."""
    return isinstance(earlier, Look) and isinstance(now, Look) and now.is_of_a_moved_tensor(earlier)


def look(tensor: Tensor) -> object:
    """Look at a tensor: address, version, device, dtype, shape and about a thousand values.

    Code that writes through ``.data``, numpy or torch.distributed, and a fused optimizer, change no version: such a
    change is missed if it also misses every sample. A look at a tensor that must be read in full equals no other.
    """
    if consists_of_others(tensor):
        inner_looks = [look(inner) for inner in inner_tensors(tensor)]
        return version_of(tensor), inner_looks
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_inference():
        return object()
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
    """How many values lie between two samples. It shares no factor with the rows: or some columns would be missed."""
    step = values.numel() // _SAMPLES + 1
    columns = max(1, values.shape[-1:].numel())
    while math.gcd(step, columns) > 1:
        step += 1
    return step


class Seen:
    """A tensor, or the local shard of a DTensor, as it was at one moment. A copy of this knows only the values."""

    def __init__(self, tensor: Tensor, known_digest: int | None = None) -> None:
        local = to_local(tensor)
        self.dtype = local.dtype
        self._tensor: Tensor | None = tensor  # no weak reference: torch refuses to swap tensors with one
        self._look = look(local)
        self._samples = samples(local).to("cpu", copy=True) if isinstance(self._look, Look) else None
        self._digest = known_digest

    def is_unchanged(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, without visible change."""
        return tensor is self._tensor and self._look == look(to_local(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the same values. It may have moved to another device."""
        if tensor.is_meta or tensor.dtype != self.dtype:
            return False
        if self._is_kept(tensor):
            return True
        digest_then = self.digest()
        return digest_then is not None and digest_then == digest(to_local(tensor))

    def is_alike(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the same values. If it was moved or converted, about a thousand of them decide."""
        if tensor.is_meta or self.is_still(tensor):
            return True
        local = to_local(tensor)
        if self._digest is not None and local.dtype == self.dtype:  # so all values have been compared
            return False
        if self._samples is None or consists_of_others(local):
            return True
        return digest(samples(local).cpu()) == digest(self._samples.to(local.dtype))

    def _is_kept(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, without visible change, here or on another device."""
        if tensor is not self._tensor:
            return False
        now = look(to_local(tensor))
        return now == self._look or _was_only_moved(self._look, now)

    def digest(self) -> int | None:
        """Return the digest of the values at that moment. None: they changed before anyone asked for it."""
        if self._digest is None and self._tensor is not None and self._is_kept(self._tensor):
            self._digest = digest(to_local(self._tensor))
        return self._digest

    def __getstate__(self) -> dict[str, Any]:
        known = {"dtype": self.dtype, "_samples": self._samples, "_digest": self.digest()}
        return {**known, "_tensor": None, "_look": None}

"""Values of tensors: copy, replace and compare them."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.private import version_of
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.shards import is_dtensor, to_local


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a copy in CPU memory. A tensor without values stays on the meta device."""
    return tensor.detach().clone() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def replace_values(tensor: Tensor, values: Tensor) -> None:
    """Replace the values of a tensor, which stays the same object. Nothing is copied, but to a DTensor."""
    if is_dtensor(tensor):
        if tensor.dtype == values.dtype and to_local(tensor).shape == to_local(values).shape:
            to_local(tensor).copy_(to_local(values))  # FSDP2 sends this memory to the other processes
        else:
            torch.utils.swap_tensors(tensor, nn.Parameter(values, tensor.requires_grad))
        return
    if tensor.is_inference() and not values.is_inference():  # or torch would miss a version counter in every use
        with torch.inference_mode():
            values = values.clone()
    tensor.data = values


def set_aside(tensor: Tensor) -> Tensor:
    """Return values to keep, in CPU memory, before :func:`replace_values`. They are copied only if necessary."""
    if is_dtensor(tensor):
        return copy_to_host(tensor)
    values = tensor.data.cpu()
    is_view = values.untyped_storage().nbytes() > values.nbytes  # of a larger memory, which others may reuse
    return values.clone() if is_view else values


def set_requires_grad(tensor: Tensor, flag: bool) -> None:
    """Set ``requires_grad``, also of a tensor made in ``torch.inference_mode``."""
    if tensor.requires_grad != flag:
        with torch.inference_mode(tensor.is_inference()):
            tensor.requires_grad_(flag)


def same_bits(tensor: Tensor, original: Tensor) -> bool:
    """Whether two tensors have the same bits in the first one's dtype. Of a DTensor, the local shard is compared."""
    tensor, original = to_local(tensor), to_local(original)
    if tensor.is_meta or original.is_meta:
        return tensor.is_meta and original.is_meta
    return tensor.shape == original.shape and digest(tensor.cpu()) == digest(original.to(tensor.dtype))


# Tensors as they were

_SAMPLES = 1024


def look(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return what can be seen of a tensor quickly: address, version, device, dtype, shape and about a thousand values.

    Two looks differ after almost every change. Code that writes through ``.data``, numpy or torch.distributed, and a
    fused optimizer, change no version: such a change is missed if it also misses every sample. None: the tensor must be
    read in full.
    """
    if hasattr(tensor, "__tensor_flatten__"):
        inner = [look(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
        return None if None in inner else (None, version_of(tensor), *inner)
    if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_inference():
        return None
    seen = (str(tensor.device), tensor.dtype, tuple(tensor.shape), digest(samples(tensor)))
    return tensor.data_ptr(), version_of(tensor), *seen


def samples(tensor: Tensor) -> Tensor:
    """Return about a thousand values, at the same places however the tensor lies in memory."""
    values = tensor.detach()
    step = values.numel() // _SAMPLES + 1
    while values.dim() and math.gcd(step, values.shape[-1] or 1) > 1:  # or it would meet some columns only
        step += 1
    if values.is_contiguous():
        return values.reshape(-1)[::step]
    places = torch.arange(0, values.numel(), step, device=values.device)
    return values[torch.unravel_index(places, values.shape)]


class Seen:
    """A tensor, or the local shard of a DTensor, as it was at one moment. A copy of this knows only the values."""

    def __init__(self, tensor: Tensor, known: int | None = None) -> None:
        self._tensor: Tensor | None = tensor  # no weak reference: torch refuses to swap tensors with one
        tensor = to_local(tensor)
        self._look = look(tensor)
        self._some = None if self._look is None or self._look[0] is None else samples(tensor).to("cpu", copy=True)
        self._digest = known
        self.dtype = tensor.dtype

    def is_unchanged(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, without visible change."""
        return tensor is self._tensor and self._look is not None and self._look == look(to_local(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the same values. It may have moved to another device."""
        if tensor.is_meta or tensor.dtype != self.dtype:
            return False
        if self._is_kept(tensor):
            return True
        known = self.digest()
        return known is not None and known == digest(to_local(tensor))

    def is_alike(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` has the same values. If it was moved or converted, about a thousand of them decide."""
        if tensor.is_meta or self.is_still(tensor):
            return True
        tensor = to_local(tensor)
        if self._some is None or hasattr(tensor, "__tensor_flatten__"):
            return self.dtype != tensor.dtype or self._digest is None
        if tensor.dtype == self.dtype and self._digest is not None:
            return False
        return digest(samples(tensor).cpu()) == digest(self._some.to(tensor.dtype))

    def _is_kept(self, tensor: Tensor) -> bool:
        """Whether it is the same tensor, without visible change, here or on another device."""
        return self.is_unchanged(tensor) or (tensor is self._tensor and self._has_moved(tensor))

    def _has_moved(self, tensor: Tensor) -> bool:
        """Whether the tensor is on another device, not written to, with equal samples."""
        now, then = look(to_local(tensor)), self._look
        if now is None or then is None or then[0] is None:  # tensors inside it may have changed
            return False
        return now[2] != then[2] and (now[1], *now[3:]) == (then[1], *then[3:])

    def digest(self) -> int | None:
        """Return the digest of the values at that moment. None: they changed before anyone asked for it."""
        if self._digest is None and self._tensor is not None and self._is_kept(self._tensor):
            self._digest = digest(to_local(self._tensor))
        return self._digest

    def __getstate__(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "_tensor": None, "_look": None, "_some": self._some, "_digest": self.digest()}

"""Conversions that layers share: an attention's query, key and value would each keep a copy of the one input.

Under autocast every layer converts its input, and one that trains keeps what it made until its backward pass. Nothing
needs to be known of the model to make it once: layers called one after the other with the very same tensor share it.
"""

import threading
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x`` in ``dtype``, made once for all who ask before another tensor is asked for.

    Example:
        >>> x = torch.ones(2)
        >>> cast(x, torch.bfloat16) is cast(x, torch.bfloat16), cast(x.add_(1), torch.bfloat16)
        (True, tensor([2., 2.], dtype=torch.bfloat16))
    """
    if x.dtype is dtype or x.is_inference() or not torch.is_grad_enabled():  # else nobody keeps a copy
        return x.to(dtype)
    state = (dtype, x._version, x.data_ptr(), x.shape, x.requires_grad)
    last = _LAST.made
    if last is None or last.of() is not x or last.state != state:
        last = _LAST.made = _Made(weakref.ref(x, _forget), state, x.to(dtype))
    return last.result


class _Made(NamedTuple):
    of: weakref.ref[Tensor]
    state: tuple[Any, ...]
    """What must not have changed."""
    result: Tensor


class _Last(threading.local):
    made: _Made | None = None


_LAST = _Last()
"""The last conversion in each thread."""


def _forget(gone: weakref.ref[Tensor]) -> None:
    if _LAST.made is not None and _LAST.made.of is gone:
        _LAST.made = None

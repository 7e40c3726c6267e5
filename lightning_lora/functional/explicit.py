"""Where gradients may be computed explicitly: written out, without torch's autograd."""

import torch
from torch import Tensor, nn

from lightning_lora import private

# These checks run in every call. After a product of large matrices the caches are cold,
# so every torch function that is not called saves some microseconds.

_WITHOUT_OWN_OPERATIONS = {Tensor, nn.Parameter, type(None)}


def can_be_explicit(x: Tensor, *others: Tensor | None) -> bool:
    """Whether nothing but torch's plain operations runs here, and nobody looks at each of them.

    Code that compiles, traces, counts or transforms operations looks at them. Some
    classes of tensors have operations of their own.
    """
    return (
        not torch.compiler.is_compiling()
        and _WITHOUT_OWN_OPERATIONS.issuperset(map(type, (x, *others)))
        and (x.is_cpu or x.is_cuda)
        and x.is_floating_point()
        and not x.is_nested
        and x.layout is torch.strided
        and not private.is_transforming()
        and not private.count_modes()  # modes that count, trace or store operations
        and not private.is_forward_differentiating()
        and not private.tracing()
        # dropout: a replay of a CUDA graph would drop the same elements, by the same seed
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def is_autocast_enabled(tensor: Tensor) -> bool:
    """Whether autocast is enabled for a tensor's device."""
    return private.is_any_autocast_enabled() and torch.is_autocast_enabled(
        tensor.device.type
    )

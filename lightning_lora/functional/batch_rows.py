"""Rows of a batch with updates of their own: add these in one product."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_lora.functional.dtypes import as_dtype
from lightning_lora.functional.explicit import can_be_explicit
from lightning_lora.functional.factors import Factors


def stacked(updates: Sequence[Factors]) -> Factors:
    """Return n updates in two tensors.

    Shape:
        Each A: (r, in) and B: (out, r). Together A: (n, r, in), B: (n, out, r). Smaller
        ranks get zeros.
    """
    factors_a = [a for a, _ in updates]
    factors_b = [b.mT for _, b in updates]
    stacked_a = pad_sequence(factors_a, batch_first=True)
    stacked_b = pad_sequence(factors_b, batch_first=True).mT
    return stacked_a, stacked_b


def add_to_rows(output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    r"""Add an update to each row of a linear layer's output.

    An update of zero changes nothing. The dtype of ``x`` may be another than that of
    ``output``: under autocast, or if the layer converts its output.

    Shape:
        ``output``: (n, \*, out), ``x``: (n, \*, in), ``lora_A``: (n, r, in),
        ``lora_B``: (n, out, r), with scaling.
    """
    a = as_dtype(lora_A, x.dtype)
    b = as_dtype(lora_B, output.dtype)
    tokens = x.reshape(len(x), -1, x.shape[-1])
    hidden = torch.bmm(a, tokens.mT)  # (n, r, tokens): faster than (n, tokens, r)
    hidden = as_dtype(hidden, output.dtype)
    flat = output.reshape(len(x), -1, output.shape[-1])
    if _can_add_in_place(flat, hidden, b):
        sums = flat.baddbmm_(hidden.mT, b.mT)
    else:
        sums = torch.baddbmm(flat, hidden.mT, b.mT)
    return as_dtype(sums.view(output.shape), output.dtype)


def _can_add_in_place(output: Tensor, hidden: Tensor, lora_B: Tensor) -> bool:
    """Whether the sum may overwrite the output: no gradient needs it, and nobody looks at each operation."""
    return not torch.is_grad_enabled() and can_be_explicit(output, hidden, lora_B)

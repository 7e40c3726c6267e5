"""Rows of a batch with updates of their own: add these in one product, or take some rows out and put them back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_lora.errors import ConfigError
from lightning_lora.functional.factors import Factors
from lightning_lora.functional.plain import are_plain, as_dtype
from lightning_lora.private import tree_flatten, tree_unflatten


def stacked(updates: Sequence[Factors]) -> Factors:
    """Return n updates in two tensors.

    Shape:
        Each A: (r, in) and B: (out, r). Together A: (n, r, in), B: (n, out, r). Smaller ranks get zeros.
    """
    factors_a = [a for a, _ in updates]
    factors_b = [b.mT for _, b in updates]
    stacked_a = pad_sequence(factors_a, batch_first=True)
    stacked_b = pad_sequence(factors_b, batch_first=True).mT
    return stacked_a, stacked_b


def add_to_rows(output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    r"""Add an update to each row of a linear layer's output.

    An update of zero changes nothing.

    Shape:
        ``output``: (n, \*, out), ``x``: (n, \*, in), ``lora_A``: (n, r, in), ``lora_B``: (n, out, r), with scaling.
    """
    a = as_dtype(lora_A, x.dtype)
    b = as_dtype(lora_B, x.dtype)
    tokens = x.reshape(len(x), -1, x.shape[-1])
    hidden = torch.bmm(a, tokens.mT)  # (n, r, tokens): faster than (n, tokens, r)
    flat = output.reshape(len(x), -1, output.shape[-1])
    if _can_add_in_place(flat, hidden, b):
        sums = flat.baddbmm_(hidden.mT, b.mT)
    else:
        sums = torch.baddbmm(flat, hidden.mT, b.mT)
    return as_dtype(sums.view(output.shape), output.dtype)


def _can_add_in_place(output: Tensor, hidden: Tensor, lora_B: Tensor) -> bool:
    if torch.is_grad_enabled():
        return False
    have_one_dtype = output.dtype is hidden.dtype is lora_B.dtype
    return have_one_dtype and are_plain(output, hidden, lora_B)


def taken(tree: Any, rows: Tensor, n: int, later: int = 0, whole: Tensor | None = None) -> Any:
    """Return arguments or outputs with some of n rows.

    Rows are dimension 0 of the first tensor, and dimension ``later`` of the others. ``whole`` stays whole.
    """
    leaves, spec = tree_flatten(tree)
    dim = 0
    for place, leaf in enumerate(leaves):
        if leaf is not whole and _has_rows(leaf, dim, n):
            leaves[place] = leaf.index_select(dim, rows.to(leaf.device))
        dim = later
    return tree_unflatten(leaves, spec)


def put_back(name: str, outputs: Sequence[Any], rows: Sequence[Tensor], later: int = 0) -> Any:
    """Return one output of the layer ``name`` from those of some rows each."""
    leaves_by_output = []
    for output in outputs:
        leaves, spec = tree_flatten(output)
        leaves_by_output.append(leaves)
    order = torch.cat(list(rows)).argsort()
    together = []
    dim = 0
    for parts in zip(*leaves_by_output, strict=True):
        together.append(_put_together(name, parts, rows, order, dim))
        dim = later
    return tree_unflatten(together, spec)


def _put_together(name: str, parts: Sequence[Any], rows: Sequence[Tensor], order: Tensor, dim: int) -> Any:
    """Return one tensor from those of some rows each. What has no rows must be the same in all of them."""
    first = parts[0]
    have_rows = [_has_rows(part, dim, len(row)) for part, row in zip(parts, rows, strict=True)]
    if all(have_rows):
        return torch.cat(list(parts), dim).index_select(dim, order.to(first.device))
    for part in parts:
        if isinstance(part, Tensor) or part != first:
            about = f"{name!r} returns a {type(first).__name__} without a row for each name"
            raise ConfigError(f"{about}, so that those of several adapters cannot be put together. Use set_adapter.")
    return first


def _has_rows(leaf: Any, dim: int, n: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == n

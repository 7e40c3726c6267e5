"""Rows of a batch with updates of their own: add these in one product, or take some rows out and put them back."""

from collections.abc import Callable, Sequence
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
    reading = pad_sequence([a for a, _ in updates], batch_first=True)
    return reading, pad_sequence([b.mT for _, b in updates], batch_first=True).mT


def add_to_rows(output: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    r"""Add an update to each row of a linear layer's output.

    An update of zero changes nothing.

    Shape:
        ``output``: (n, \*, out), ``x``: (n, \*, in), ``lora_A``: (n, r, in), ``lora_B``: (n, out, r), with scaling.
    """
    a, b = as_dtype(lora_A, x.dtype), as_dtype(lora_B, x.dtype)
    hidden = torch.bmm(a, x.reshape(len(x), -1, x.shape[-1]).mT)  # (n, r, tokens): faster than (n, tokens, r)
    flat = output.reshape(len(x), -1, output.shape[-1])
    in_place = not torch.is_grad_enabled() and are_plain(flat, hidden, b) and flat.dtype is hidden.dtype is b.dtype
    add: Callable[..., Tensor] = Tensor.baddbmm_ if in_place else torch.baddbmm
    return as_dtype(add(flat, hidden.mT, b.mT).view(output.shape), output.dtype)


def taken(tree: Any, rows: Tensor, n: int, later: int = 0, whole: Tensor | None = None) -> Any:
    """Return arguments or outputs with some of n rows.

    Rows are dimension 0 of the first tensor, and dimension ``later`` of the others. ``whole`` stays whole.
    """
    leaves, spec = tree_flatten(tree)
    for i, leaf in enumerate(leaves):
        if leaf is not whole and _has_rows(leaf, later if i else 0, n):
            leaves[i] = leaf.index_select(later if i else 0, rows.to(leaf.device))
    return tree_unflatten(leaves, spec)


def put_back(name: str, outputs: Sequence[Any], rows: Sequence[Tensor], later: int = 0) -> Any:
    """Return one output of the layer ``name`` from those of some rows each."""
    flat, order = list(map(tree_flatten, outputs)), torch.cat(list(rows)).argsort()
    leaves = []
    for i, group in enumerate(zip(*(each for each, _ in flat), strict=True)):
        along, first = later if i else 0, group[0]
        if all(map(_has_rows, group, [along] * len(rows), map(len, rows))):
            first = torch.cat(group, along).index_select(along, order.to(first.device))
        elif any(isinstance(leaf, Tensor) or leaf != first for leaf in group):
            about = f"{name!r} returns a {type(first).__name__} without a row for each name"
            raise ConfigError(f"{about}, so that those of several adapters cannot be put together. Use set_adapter.")
        leaves.append(first)
    return tree_unflatten(leaves, flat[0][1])


def _has_rows(leaf: Any, along: int, n: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > along and leaf.shape[along] == n

"""Take some rows of a batch out of a module's arguments or outputs, and put outputs together again.

The tensors may be in containers of any depth. Rows are dimension 0 of the first tensor. They are dimension
``states_dim`` of the others: of a recurrent layer's states, they are dimension 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.private import tree_flatten, tree_unflatten


class NoRowsError(ValueError):
    """An output is no tensor with rows, and differs between the parts of a batch. Its type is the argument."""


def take_rows(values: Any, rows: Tensor, n: int, states_dim: int = 0, mask: Tensor | None = None) -> Any:
    """Return arguments or outputs with some of n rows. A ``mask`` that all rows share stays whole."""
    leaves, spec = tree_flatten(values)
    dim = 0
    for place, leaf in enumerate(leaves):
        if leaf is not mask and _has_rows(leaf, dim, n):
            leaves[place] = leaf.index_select(dim, rows.to(leaf.device))
        dim = states_dim
    return tree_unflatten(leaves, spec)


def put_together(outputs: Sequence[Any], rows: Sequence[Tensor], states_dim: int = 0) -> Any:
    """Return one output from those of some rows each.

    Raises:
        NoRowsError: something in them has no rows, and is not the same in all.
    """
    leaves_by_output = []
    for output in outputs:
        leaves, spec = tree_flatten(output)
        leaves_by_output.append(leaves)
    order = torch.cat(list(rows)).argsort()
    together = []
    dim = 0
    for parts in zip(*leaves_by_output, strict=True):
        together.append(_put_parts_together(parts, rows, order, dim))
        dim = states_dim
    return tree_unflatten(together, spec)


def _put_parts_together(parts: Sequence[Any], rows: Sequence[Tensor], order: Tensor, dim: int) -> Any:
    """One tensor from those of some rows each. What has no rows must be the same in all of them."""
    first = parts[0]
    have_rows = [_has_rows(part, dim, len(row)) for part, row in zip(parts, rows, strict=True)]
    if all(have_rows):
        return torch.cat(list(parts), dim).index_select(dim, order.to(first.device))
    for part in parts:
        if isinstance(part, Tensor) or part != first:
            raise NoRowsError(type(first).__name__)
    return first


def _has_rows(leaf: Any, dim: int, n: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == n

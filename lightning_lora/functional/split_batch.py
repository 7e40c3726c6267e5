"""Split a batch between adapters: take some of its rows out of a module's arguments, and put outputs together again.

Arguments and outputs are values in containers of any depth: tensors, and others such as
numbers. A tensor has rows if it is as long as the batch. The first value has them in
dimension 0, and all others have them in dimension ``states_dim``: the states of a
recurrent layer, behind its sequence, have them in dimension 1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_lora.private import tree_flatten, tree_unflatten


class NoRowsError(ValueError):
    """Outputs of parts of a batch have a value that cannot be put together: the message is the name of its type."""


def take_rows(
    values: Any, rows: Tensor, n: int, states_dim: int = 0, mask: Tensor | None = None
) -> Any:
    """Return arguments or outputs with some of the batch's n rows.

    What has no rows stays as it is, and so does a ``mask`` that all rows share, though
    it may be as long.
    """
    leaves, spec = tree_flatten(values)
    for place, leaf in enumerate(leaves):
        dim = _batch_dim(place, states_dim)
        if leaf is not mask and _has_rows(leaf, dim, n):
            leaves[place] = leaf.index_select(dim, rows.to(leaf.device))
    return tree_unflatten(leaves, spec)


def put_together(
    outputs: Sequence[Any], rows: Sequence[Tensor], states_dim: int = 0
) -> Any:
    """Return the output of a whole batch from those of its parts.

    ``rows`` are the rows of each part.

    Raises:
        NoRowsError: a tensor in them has no rows, or another value differs between
            them.
    """
    leaves_by_output = []
    for output in outputs:
        leaves, spec = tree_flatten(output)
        leaves_by_output.append(leaves)
    order = torch.cat(list(rows)).argsort()
    together = []
    for place, parts in enumerate(zip(*leaves_by_output, strict=True)):
        dim = _batch_dim(place, states_dim)
        together.append(_put_parts_together(parts, rows, order, dim))
    return tree_unflatten(together, spec)


def _put_parts_together(
    parts: Sequence[Any], rows: Sequence[Tensor], order: Tensor, dim: int
) -> Any:
    """One tensor from those of the parts, or the value that is the same in all of them.

    A tensor without rows, such as a mean over the batch, is refused, even if it is the
    same in all.
    """
    have_rows = [
        _has_rows(part, dim, len(row)) for part, row in zip(parts, rows, strict=True)
    ]
    first = parts[0]
    if all(have_rows):
        return torch.cat(list(parts), dim).index_select(dim, order.to(first.device))
    for part in parts:
        if isinstance(part, Tensor) or part != first:
            raise NoRowsError(type(first).__name__)
    return first


def _batch_dim(place: int, states_dim: int) -> int:
    """The dimension in which the value at this place has the rows of the batch."""
    return 0 if place == 0 else states_dim


def _has_rows(leaf: Any, dim: int, n: int) -> bool:
    """Whether a value is a tensor that is as long as the batch of n rows."""
    return isinstance(leaf, Tensor) and leaf.dim() > dim and leaf.shape[dim] == n

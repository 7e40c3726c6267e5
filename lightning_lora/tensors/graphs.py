"""Graphs of torch's autograd."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def nodes_behind(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yield each node of the graphs from which these tensors were computed, once."""
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen = {None}
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            nodes += [before for before, _ in node.next_functions]
            yield node

"""Count the messages that a process sends to others."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce",
}
"""What torch's operators are called here. Others keep their names."""

_EMPTY = ("barrier", "wait_tensor", "_wrap_tensor_autograd")
"""Operators that send nothing."""


Messages = list[tuple[str, int]]


class Traffic(TorchDispatchMode):
    """Notes the messages in its context.

    Each has its kind and its bytes. It counts whole: what an all-gather returns, what the others begin with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: Messages = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what is done to its parts comes here too
        name = func.__name__.partition(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in _EMPTY:
            sizes = [sum(t.nbytes for t in tree_leaves(arg) if isinstance(t, Tensor)) for arg in args]
            parts = args[1] if name == "all_gather_into_tensor" else 1  # it is given one part, and their number
            self.messages.append((_KINDS.get(name, name), max(sizes) * parts))
        return func(*args, **(kwargs or {}))

    def leave(self) -> Messages:
        """Leave the context, and return the messages since it was entered."""
        self.__exit__(None, None, None)
        found, self.messages = self.messages, []
        return found


def sizes_of(messages: Messages, kind: str) -> list[int]:
    """The bytes of all messages of a kind."""
    return [size for found, size in messages if found == kind]

"""Count the messages that a process sends to others, and the bytes that it holds."""

from pathlib import Path
from typing import Any

import lightning as L
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

    Each has its kind and its bytes. It counts whole: what an all-gather returns, what
    the others begin with.
    """

    def __init__(self) -> None:
        super().__init__()
        self.messages: Messages = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # what is done to its parts comes here too
        name = func.__name__.partition(".")[0]
        if func.namespace in ("c10d", "_c10d_functional") and name not in _EMPTY:
            largest = max(bytes_in(argument) for argument in args)
            # it is given one part, and their number
            parts = args[1] if name == "all_gather_into_tensor" else 1
            self.messages.append((_KINDS.get(name, name), largest * parts))
        return func(*args, **(kwargs or {}))

    def leave(self) -> Messages:
        """Leave the context, and return the messages since it was entered."""
        self.__exit__(None, None, None)
        found = self.messages
        self.messages = []
        return found


def bytes_in(values: Any) -> int:
    """The bytes of all tensors in a nested structure."""
    return sum(
        value.nbytes for value in tree_leaves(values) if isinstance(value, Tensor)
    )


def sizes_of(messages: Messages, kind: str) -> list[int]:
    """The bytes of all messages of a kind."""
    return [size for found, size in messages if found == kind]


class Counts(L.Callback):
    """Counts the messages of each batch, of two saves and of the end of a fit, and what this process holds."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.traffic = Traffic()
        self.batches: list[Messages] = []
        self.saves: list[Messages] = []
        self.end: Messages = []
        self.held: dict[str, int] = {}

    def on_train_batch_start(self, *_: Any) -> None:
        self.traffic.__enter__()

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        self.held["gradients"] = own_bytes(p.grad for p in pl_module.parameters())

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches.append(self.traffic.leave())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for number in range(2):
            self.traffic.__enter__()
            trainer.save_checkpoint(self.folder / f"{number}.ckpt")
            self.saves.append(self.traffic.leave())
        self.held |= {
            "parameters": own_bytes(pl_module.parameters()),
            "adapters": own_bytes(
                p for name, p in pl_module.named_parameters() if "lora_" in name
            ),
            "optimizer": own_bytes(tree_leaves(dict(trainer.optimizers[0].state))),
        }
        self.traffic.__enter__()

    def on_fit_end(self, *_: Any) -> None:  # after LoRACallback's
        self.end = self.traffic.leave()


def own_bytes(values: Any) -> int:
    """The bytes that this process holds of tensors.

    AdamW's steps are not counted: numbers without dimensions.
    """
    found = (
        getattr(value, "_local_tensor", value)
        for value in values
        if isinstance(value, Tensor) and value.ndim
    )
    return sum(value.nbytes for value in found)

"""Open blocks of ``adapter_names``: they run layers as they found them, so a change of adapters in one is refused."""

from collections.abc import Collection
from contextlib import ExitStack
from weakref import WeakSet

from torch import nn

from lightning_lora.errors import AdapterStateError
from lightning_lora.tensors.names import modules_by_name, plain_module

_OPEN: WeakSet[nn.Module] = WeakSet()
"""The modules that an open block runs in its own way."""


def open_block(modules: Collection[nn.Module]) -> ExitStack:
    """Note that a block runs these modules, until what is returned is closed.

    Modules of a block around this one stay open after that.
    """
    opened = set(modules).difference(_OPEN)
    _OPEN.update(opened)
    block = ExitStack()
    block.callback(_OPEN.difference_update, opened)
    return block


def is_in_block(module: nn.Module) -> bool:
    """Whether an open block runs this module."""
    return module in _OPEN


def refuse_in_block(model: nn.Module, call: str) -> None:
    """Refuse a call that changes adapters in a block.

    That is, while a block runs layers of ``model``. A copy of the model has no open
    block.
    """
    if _OPEN and not _OPEN.isdisjoint(modules_by_name(model).values()):
        raise AdapterStateError(
            f"{call} is not possible in a block of adapter_names: each row of "
            f"{type(plain_module(model)).__name__} has its own adapter there. Do it "
            "before the block, or after it."
        )

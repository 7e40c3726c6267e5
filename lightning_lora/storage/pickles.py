"""Read the plain values and tensors of a checkpoint.

A checkpoint may hold objects of classes, for example as hyperparameters. ``torch.load`` refuses it, or imports these
classes and runs their code. Adapters are plain tensors. So here an :class:`Unread` stands for everything but
containers, numbers, text and tensors. Nothing that the file names is imported or called.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Unread:
    """Stands for an object, or for its class."""

    name: str
    """What the file calls the class or function."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take whatever the object would have been made from."""

    def __call__(self, *_: Any, **__: Any) -> "Unread":
        """Stand for what a call would return too."""
        return self

    def _ignore(self, *_: Any) -> None:
        """What a pickle does with an object that it has made."""

    append = extend = add = __setitem__ = __setstate__ = _ignore


def load_plain(source: Any, **options: Any) -> Any:
    """Return the contents of an archive of torch.

    If they are more than plain types, what is plain of them is returned, and the rest is :class:`Unread`.

    Args:
        source: A path or an open file.
        **options: Further arguments of ``torch.load``.
    """
    try:
        return torch.load(source, map_location="cpu", weights_only=True, **options)
    except UnpicklingError:
        if hasattr(source, "seek"):
            source.seek(0)
        return torch.load(source, map_location="cpu", weights_only=False, pickle_module=_PLAIN, **options)


def unread_in(value: Any) -> list[str]:
    """Return the names of all :class:`Unread` inside a value."""
    found, inside, seen = [], [value], set[int]()
    while inside:
        each = inside.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        kind = each if isinstance(each, type) else type(each)
        if issubclass(kind, Unread):
            found.append(kind.name[:80])
        elif isinstance(each, dict):
            inside += each.values()
        elif isinstance(each, list | tuple | set):
            inside += each
    return found


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A tensor as torch builds it, but never beyond its storage."""
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage).as_strided(size, stride, offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _class(name: str) -> type[Unread]:
    """What stands for a class: a new one each time, because a pickle may change it."""
    return type("Unread", (Unread,), {"name": name})


def _class_inside(owner: Any, name: str) -> type[Unread]:
    return _class(f"{getattr(owner, 'name', '')}.{name}")


_KNOWN: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": OrderedDict,
    "builtins.getattr": _class_inside,
    "__builtin__.getattr": _class_inside,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
"""What makes the values that are read, by its name in a file."""


class _Unpickler(pickle.Unpickler):
    """An unpickler that finds no class or function of anybody's."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function."""
        called = f"{module}.{name}"
        return partial(_KNOWN[called]) if called in _KNOWN else _class(called)


_PLAIN = SimpleNamespace(__name__="plain", Unpickler=_Unpickler)
"""The module that ``torch.load`` takes for ``pickle``."""

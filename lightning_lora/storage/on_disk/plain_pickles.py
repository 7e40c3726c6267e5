"""Archives of torch that may hold more than plain types: what is plain in them, and names for the rest.

A checkpoint may hold objects of classes, for example as hyperparameters. torch.load
refuses it, or imports these classes and runs their code. Adapters are plain tensors, so
here an :class:`Unread` stands for everything but containers, numbers, text and tensors.
Nothing that the file names is imported or called.
"""

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.private import STORAGE_BYTES


class Unread:
    """Stands for an object, or for its class."""

    name: str  # what the file calls the class or function

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what the object would have been made from."""

    def __call__(self, *_: Any, **__: Any) -> "Unread":
        """Stand for what a call would return too."""
        return self

    def _ignore(self, *_: Any) -> None:
        """What a pickle does with an object that it has made."""

    append = extend = add = __setitem__ = __setstate__ = _ignore


def load_plain(source: Any, **options: Any) -> Any:
    """Return what is plain in an archive of torch, and :class:`Unread` for the rest.

    ``source`` may be an open file.
    """
    try:
        with warnings.catch_warnings():
            # torch 2.15 says that it checks sparse tensors: here they are refused anyway
            warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
            return torch.load(source, map_location="cpu", weights_only=True, **options)
    except UnpicklingError:
        if hasattr(source, "seek"):
            source.seek(0)
        return torch.load(
            source,
            map_location="cpu",
            weights_only=False,
            pickle_module=_PICKLE,
            **options,
        )


def unread_in(value: Any) -> list[str]:
    """Return the names of all :class:`Unread` inside a value."""
    names = list[str]()
    remaining = [value]
    seen = set[int]()
    while remaining:
        each = remaining.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        kind = each if isinstance(each, type) else type(each)
        if issubclass(kind, Unread):
            names.append(kind.name[:80])
        else:
            remaining += _contained_in(each)
    return names


def _contained_in(value: Any) -> Iterable[Any]:
    """The elements of a container. Anything else has none."""
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, list | tuple | set):
        return value
    return ()


def _tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A tensor as torch builds it, but never beyond its storage."""
    whole = torch.empty(0, dtype=storage.dtype).set_(getattr(storage, STORAGE_BYTES))
    return whole.as_strided(size, stride, offset)


def _class(name: str) -> type[Unread]:
    """What stands for a class: a new one each time, because a pickle may change it."""
    return type("Unread", (Unread,), {"name": name})


def _class_inside(owner: Any, name: str) -> type[Unread]:
    """What stands for a class inside a class."""
    return _class(f"{getattr(owner, 'name', '')}.{name}")


def _parameter(data: Any, *_: Any) -> Any:
    """A parameter: its tensor."""
    return data


_PLAIN: dict[str, Callable[..., Any]] = {  # what a pickle may call, by its name there
    "collections.OrderedDict": OrderedDict,
    "__builtin__.getattr": _class_inside,
    "__builtin__.set": set,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that finds no class or function of anybody's."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function."""
        called = f"{module}.{name}"
        if called not in _PLAIN:
            return _class(called)
        # a new object each time, because a pickle may change what it gets
        return partial(_PLAIN[called])


_PICKLE = SimpleNamespace(
    __name__="plain", Unpickler=_PlainUnpickler
)  # the module that ``torch.load`` takes for ``pickle``

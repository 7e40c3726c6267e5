"""Read a checkpoint's plain values and tensors, and nothing else.

A checkpoint may hold objects of classes, for example as hyperparameters. ``torch.load`` refuses it, or imports these
classes and runs their code. Adapters are plain tensors. So this reader goes through the pickle by itself, step by step.
It makes containers, numbers, text and tensors. An :class:`Unread` stands for everything else. Nothing that the file
names is imported or called.
"""

import pickletools
import zipfile
from collections.abc import Callable, Sequence
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor


class Unread:
    """An object that only its own code could make.

    Args:
        name: What the file calls its class or function.
    """

    def __init__(self, name: str) -> None:
        self.name = name


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
        return read_plain(source)


def read_plain(file: Any) -> Any:
    """Return containers, numbers, text and strided tensors of an archive.

    Everything else becomes :class:`Unread`, sets and bytes too.
    """
    with zipfile.ZipFile(file) as archive:
        return _Reader(archive).read()


def unread_in(value: Any) -> list[str]:
    """Return the names of all :class:`Unread` inside a value."""
    found, inside, seen = [], [value], set[int]()
    while inside:
        each = inside.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, Unread):
            found.append(each.name[:80])
        elif isinstance(each, dict):
            inside += each.values()
        elif isinstance(each, list | tuple):
            inside += each
    return found


class _Reader:
    """The state of a pickle that is being read: a stack, and what is remembered.

    Source:
        Python's ``pickletools``, which says of each operation what it does to the stack.
    """

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        self.folder = archive.namelist()[0].partition("/")[0]
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what is below each mark
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Tensor] = {}

    def read(self) -> Any:
        for operation, argument, _ in pickletools.genops(self._record("data.pkl")):
            _STEPS[operation.name](self, argument)
        return self.stack.pop()

    def _record(self, name: str) -> bytes:
        return self.archive.read(f"{self.folder}/{name}")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    # Steps: each takes the operation's argument

    def remember(self, place: int | None) -> None:
        self.memo[len(self.memo) if place is None else place] = self.stack[-1]

    def extend(self, items: Sequence[Any]) -> None:
        if type(self.stack[-1]) is list:
            self.stack[-1] += items

    def set_items(self, items: Sequence[Any]) -> None:
        if type(self.stack[-1]) is dict:
            for key, value in zip(items[::2], items[1::2], strict=True):
                other = Unread(f"a {type(key).__name__} as a key")
                self.stack[-1] |= {key: value} if type(key) in _KEYS else {other: other}

    def make(self, arguments: Any) -> None:
        """Make an object with the name on the stack."""
        self.push(_made(self.pop(), arguments))

    def load_storage(self, place: Any) -> None:
        """Push a storage, as a tensor of one dimension."""
        if not isinstance(place, tuple) or place[0] != "storage" or place[1].name not in _DTYPES:
            self.push(Unread("a storage"))
            return
        key = str(place[2])
        if key not in self.storages:
            contents, dtype = bytearray(self._record(f"data/{key}")), _DTYPES[place[1].name]
            self.storages[key] = torch.frombuffer(contents, dtype=dtype) if contents else torch.empty(0, dtype=dtype)
        self.push(self.storages[key])


_KEYS = (str, int, float, bool, type(None))
"""The types of keys. A nested tuple could take for ever to be hashed."""

_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
"""The dtypes of torch's storages."""


def _made(kind: Any, arguments: Any) -> Any:
    """What a class or function would return, if it is one of a dictionary, a tensor or a parameter."""
    name = kind.name if isinstance(kind, Unread) else type(kind).__name__
    if name == "collections.OrderedDict":
        return {}
    first = arguments[0] if isinstance(arguments, tuple) and arguments else None
    if isinstance(first, Tensor):
        if name == "torch._utils._rebuild_tensor_v2":
            _, offset, shape, strides, *_ = arguments
            return first.as_strided(shape, strides, offset)
        if name in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return first
    return Unread(name)


def _tuple_of(count: int) -> Callable[[_Reader, Any], None]:
    def step(reader: _Reader, _: Any) -> None:
        items = tuple(reader.stack[-count:])
        del reader.stack[-count:]
        reader.push(items)

    return step


def _make_with_keywords(reader: _Reader, _: Any) -> None:
    reader.pop()
    reader.make(reader.pop())


def _set_from_mark(reader: _Reader, _: Any) -> None:
    items = reader.pop_to_mark()
    reader.push({})
    reader.set_items(items)


def _name_on_stack(reader: _Reader, _: Any) -> None:
    name, module = reader.pop(), reader.pop()
    reader.push(Unread(f"{module}.{name}"))


def _unread(name: str = "", *, to_mark: bool = False) -> Callable[[_Reader, Any], None]:
    """A step that pushes an object of this name, or of the name that is the operation's argument."""

    def step(reader: _Reader, argument: Any) -> None:
        if to_mark:
            reader.pop_to_mark()
        reader.push(Unread(name or str(argument).replace(" ", ".")))

    return step


_STEPS: dict[str, Callable[[_Reader, Any], Any]] = {
    # numbers and text are the arguments of their operations; those with other arguments follow
    **{operation.name: _Reader.push for operation in pickletools.opcodes if operation.arg},
    **dict.fromkeys(("PROTO", "FRAME", "STOP", "READONLY_BUFFER"), lambda *_: None),
    "NONE": lambda reader, _: reader.push(None),
    "NEWTRUE": lambda reader, _: reader.push(True),
    "NEWFALSE": lambda reader, _: reader.push(False),
    # containers
    "MARK": lambda reader, _: reader.mark(),
    "EMPTY_LIST": lambda reader, _: reader.push([]),
    "LIST": lambda reader, _: reader.push(reader.pop_to_mark()),
    "APPEND": lambda reader, _: reader.extend([reader.pop()]),
    "APPENDS": lambda reader, _: reader.extend(reader.pop_to_mark()),
    "EMPTY_TUPLE": lambda reader, _: reader.push(()),
    "TUPLE": lambda reader, _: reader.push(tuple(reader.pop_to_mark())),
    **{f"TUPLE{count}": _tuple_of(count) for count in (1, 2, 3)},
    "EMPTY_DICT": lambda reader, _: reader.push({}),
    "DICT": _set_from_mark,
    "SETITEM": lambda reader, _: reader.set_items([reader.pop(), reader.pop()][::-1]),
    "SETITEMS": lambda reader, _: reader.set_items(reader.pop_to_mark()),
    "EMPTY_SET": _unread("builtins.set"),
    "FROZENSET": _unread("builtins.frozenset", to_mark=True),
    "ADDITEMS": lambda reader, _: reader.pop_to_mark(),
    # the stack, and what is remembered
    "POP": lambda reader, _: reader.pop() if reader.stack else reader.pop_to_mark(),
    "POP_MARK": lambda reader, _: reader.pop_to_mark(),
    "DUP": lambda reader, _: reader.push(reader.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Reader.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda reader, place: reader.push(reader.memo[place])),
    # names, and objects made with them
    "GLOBAL": _unread(),
    "STACK_GLOBAL": _name_on_stack,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "PERSID"), _unread("an object elsewhere")),
    "INST": _unread(to_mark=True),
    "OBJ": _unread("an object", to_mark=True),
    "REDUCE": lambda reader, _: reader.make(reader.pop()),
    "NEWOBJ": lambda reader, _: reader.make(reader.pop()),
    "NEWOBJ_EX": _make_with_keywords,
    "BUILD": lambda reader, _: reader.pop(),
    "BINPERSID": lambda reader, _: reader.load_storage(reader.pop()),
}
"""What each operation of a pickle does, by its name in ``pickletools``."""

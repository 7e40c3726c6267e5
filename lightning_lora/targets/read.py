"""Layers that are never called, as the module around them computes with their weight: an adapter does nothing."""

import dis
import inspect
from functools import lru_cache
from types import CodeType
from typing import Any

from torch import nn

_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_IF_QUANTISED = {("FalconMambaMixer", "dt_proj"), ("JambaMambaMixer", "dt_proj")}  # transformers calls these only then


def is_only_read(module: nn.Module, leaf: str) -> bool:
    """Whether the forward of ``module`` reads ``self.leaf.weight``, and none of its code calls or passes the layer."""
    kind: Any = type(module)
    is_quantised = hasattr(getattr(module, "config", None), "_is_quantized")
    return _is_only_read(kind, leaf) and not (is_quantised and (kind.__name__, leaf) in _IF_QUANTISED)


@lru_cache(maxsize=1 << 14)
def _is_only_read(kind: type, leaf: str) -> bool:
    """For a class. ``forward`` may call the method that reads, which is not for a dtype, a device or a shape."""
    codes, runs, is_read = _codes(kind), set[str](), False
    for code in codes:
        if "forward" in code.co_name:
            runs.update((code.co_name, *code.co_names))
    codes = [code for code in codes if leaf in code.co_names]
    for code in codes if any("weight" in code.co_names and code.co_name in runs for code in codes) else ():
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for step, part, then in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname in _LOADS and step.argval == leaf:
                is_called = part.opname not in _LOADS or part.argval == "forward"
                if is_called and (kind.__name__, leaf) not in _IF_QUANTISED:
                    return False
                computes = part.argval == "weight" and then.argval not in ("dtype", "device", "shape")
                is_read |= computes and code.co_name in runs
    return is_read


@lru_cache(maxsize=1 << 10)
def _codes(kind: type) -> list[CodeType]:
    """The code of a class's methods and properties, and of the functions inside them."""
    found: list[Any] = []
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for value in vars(base).values():
            method: Any = value.fget if isinstance(value, property) else value
            found.append(getattr(inspect.unwrap(method), "__code__", None))
    for code in found:  # which grows
        found += code.co_consts if isinstance(code, CodeType) else ()
    return [code for code in found if isinstance(code, CodeType)]

"""How an argument means layers: by their names, by the last components of these, or by an expression."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any


def matches(entry: str, name: str) -> bool:
    """Whether an entry is a module's name, or its last components."""
    return name == entry or name.endswith("." + entry)


def matches_pattern(key: str, name: str) -> bool:
    """Whether a pattern's key, a name or an expression, fits a layer."""
    return matches(key, name) or ending(key).fullmatch(name) is not None


@functools.cache  # re itself remembers few
def ending(key: str) -> re.Pattern[str]:
    """Return the expression for names that end as a key says."""
    return re.compile(rf"(?:.*\.)?(?:{key})")


def look_up(pattern: Mapping[str, Any] | None, names: Sequence[str], default: Any) -> Any:
    """Return the value of the first key that fits one of these names. An empty one is none."""
    if pattern is None:
        return default
    for key, value in pattern.items():
        for name in names:
            if name and matches_pattern(key, name):
                return value
    return default


def as_expression(pattern: str | Sequence[str] | None) -> str:
    """Return the same pattern as an expression. That of None is empty."""
    if pattern is None:
        return ""
    if isinstance(pattern, str):
        return pattern
    return "|".join(rf"(.*\.)?{re.escape(name)}" for name in pattern)


def begins_or_ends(expression: str, other: str) -> bool:
    """Whether an expression has another as its first or last alternative. One between these may be in a group."""
    as_first = f"{other}|"
    as_last = f"|{other}"
    return expression == other or expression.startswith(as_first) or expression.endswith(as_last)

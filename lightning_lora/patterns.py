"""How an argument means layers: by their names, by the last components of these, or by an expression."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any


def matches(entry: str, name: str) -> bool:
    """Whether an entry is a module's name, or its last components."""
    return name == entry or name.endswith("." + entry)


def fits(key: str, name: str) -> bool:
    """Whether a key fits a layer: it is a name, its last components, or an expression for its end."""
    return matches(key, name) or ending(key).fullmatch(name) is not None


@functools.cache  # re itself remembers few
def ending(key: str) -> re.Pattern[str]:
    """Return the expression for names that end as a key says."""
    return re.compile(rf"(?:.*\.)?(?:{key})")


def look_up(
    values: Mapping[str, Any] | None, names: Sequence[str], default: Any
) -> Any:
    """Return the value of the first key that fits one of these names, or a default.

    An empty name fits none.
    """
    if values is None:
        return default
    for key, value in values.items():
        for name in names:
            if name and fits(key, name):
                return value
    return default


def as_expression(modules: str | Sequence[str] | None) -> str:
    """Return an expression for modules, which an argument gives as names, as an expression or not at all."""
    if modules is None:
        return ""
    if isinstance(modules, str):
        return modules
    return "|".join(rf"(.*\.)?{re.escape(name)}" for name in modules)


def union_of_expressions(expression: str, other: str) -> str:
    """Return an expression for what either of two expressions matches.

    If one has the other as its first or last alternative, it is returned as it is: a
    union that is made again does not grow. An alternative in the middle may be in a
    group, and counts for nothing.
    """
    if not other or _begins_or_ends(expression, other):
        return expression
    if not expression or _begins_or_ends(other, expression):
        return other
    return f"{expression}|{other}"


def _begins_or_ends(expression: str, alternative: str) -> bool:
    """Whether an expression has this as its first or last alternative."""
    as_first = f"{alternative}|"
    as_last = f"|{alternative}"
    return (
        expression == alternative
        or expression.startswith(as_first)
        or expression.endswith(as_last)
    )

"""Whether values from a file have the expected form, so that they are safe to use."""

import math
import re
from collections.abc import Mapping
from typing import Any


def fits(value: object, schema: Any) -> bool:
    """Whether ``value`` has the form that ``schema`` describes.

    A schema is a type; ``None``; a function that judges the value; a tuple of alternatives; ``[schema]`` for a list;
    ``{str: schema}`` for a dictionary with any names; or a dictionary with a schema for each key, in which a key that
    ends in ``"?"`` may be absent.

    Example:
        >>> schema = {"name": str, "sizes?": [int]}
        >>> fits({"name": "a"}, schema), fits({"name": "a", "sizes": [1, "2"]}, schema), fits({"sizes": []}, schema)
        (True, False, False)
    """
    if isinstance(schema, type):
        return type(value) is schema
    if isinstance(schema, tuple):
        return any(fits(value, each) for each in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(each, schema[0]) for each in value)
    if isinstance(schema, dict):
        return isinstance(value, dict) and _fields_fit(value, schema)
    return value is None if schema is None else bool(schema(value))


def _fields_fit(value: dict[Any, Any], schema: dict[Any, Any]) -> bool:
    if str in schema:
        return all(type(name) is str and fits(each, schema[str]) for name, each in value.items())
    known = {name.removesuffix("?"): each for name, each in schema.items()}
    required = {name for name in schema if not name.endswith("?")}
    return required <= value.keys() <= known.keys() and all(fits(each, known[name]) for name, each in value.items())


# Expressions


def slow_expressions(arguments: Mapping[str, Any]) -> list[str]:
    r"""Return the expressions in a file's arguments for which a search may take for ever.

    Such are repeats of what repeats or has alternatives, more than five repeats, and very long ones. What a user writes
    in code is not asked.

    Example:
        >>> slow_expressions({"target_modules": r"(a+)+b", "rank_pattern": {r".*layers\.(1|2)\..*_proj": 4}})
        ['(a+)+b']
    """
    found = list[str]()
    for argument in ("target_modules", "exclude_modules", "target_slices", "rank_pattern", "alpha_pattern"):
        given = arguments.get(argument)
        entries = [given] if isinstance(given, str) else given if isinstance(given, Mapping) else ()
        found += [entry for entry in entries if isinstance(entry, str)]
    is_long = sum(map(len, found)) > 200_000
    return [entry for entry in found if is_long or _is_slow(entry)]


def _is_slow(expression: str) -> bool:
    """Whether there may be too many ways to match it."""
    groups = [_Group()]
    for found in _TOKENS.finditer(expression):
        token, group = found[0], groups[-1]
        if token in _OPENING:
            group.add("")
            groups.append(_Group())
        elif token == ")" and len(groups) > 1:
            del groups[-1]
            groups[-1].last = group.total()
        elif token in (")", "(?", "["):  # what this does not read, such as flags
            return True
        elif token == "|":
            group.total()
        elif token[0] == "?":
            group.last += 1
        elif token[0] in "*+{":
            group.last = _REPEAT if group.last == 1 else math.inf
        else:
            group.add(token)
    return len(groups) > 1 or groups[0].total() > _REPEAT**5


class _Group:
    """In how many ways a group of an expression may match: a product for its parts, a sum for like alternatives."""

    def __init__(self) -> None:
        self.ways, self.first, self.before, self.last = dict[str, float](), "", 0.0, 1.0

    def add(self, token: str) -> None:
        if self.before == 0:  # an alternative begins; those with different letters cannot both match
            self.first, self.before = token if token.isalnum() else "", 1.0
        self.before, self.last = self.before * self.last, 1.0

    def total(self) -> float:
        ways = max(self.before, 1.0) * self.last
        self.ways[self.first] = self.ways.get(self.first, 0) + ways
        self.first, self.before, self.last = "", 0.0, 1.0
        anything = self.ways.get("", 0)
        return anything + max((ways for first, ways in self.ways.items() if first), default=0)


_REPEAT = 64.0  # as if a name had so many characters
_OPENING = ("(", "(?:", "(?=", "(?!", "(?<=", "(?<!")
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:[:=!]|<[=!])?|(?:[*+?]|\{[\d,]*\})[?+]?|.", re.DOTALL)

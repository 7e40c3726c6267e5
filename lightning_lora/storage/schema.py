"""Whether values from a file are as expected, so that they are safe to use."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_lora.errors import AdapterFileError


def fits(value: object, schema: Any) -> bool:
    """Whether ``value`` is as ``schema`` describes it.

    A schema is a type; ``None``; a function that judges the value; a tuple of alternatives; ``[schema]`` for a list;
    ``{str: schema}`` for any names; or one for each key, where a key that ends in ``"?"`` may be absent.
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


def check_named(names: Iterable[object], path: object) -> None:
    """Refuse names of tensors that are no text."""
    for name in names:
        if not isinstance(name, str):
            raise AdapterFileError(f"{path} holds {name!r} as a name. Expected strings: it is damaged or was changed.")


# Expressions


def slow_expressions(arguments: Mapping[str, Any]) -> list[str]:
    """Return the expressions in a file's arguments for which a search may take for ever.

    Such are repeats of what repeats or has alternatives, more than five repeats, and very long ones.
    """
    found = list[str]()
    for argument in ("target_modules", "exclude_modules", "target_slices", "rank_pattern", "alpha_pattern"):
        given = arguments.get(argument)
        entries = [given] if isinstance(given, str) else given if isinstance(given, Mapping) else ()
        found += [entry for entry in entries if isinstance(entry, str)]
    if sum(map(len, found)) > 200_000 or sum(map(_ways, found)) > 16 * _MOST_WAYS:
        return found
    return [expression for expression in found if _ways(expression) > _MOST_WAYS]


def _ways(expression: str) -> float:
    """About how many ways there are to match it: a product for its parts, a sum for alternatives."""
    around, others, ways, last = list[tuple[float, float]](), 1.0, 1.0, 1.0
    for token in _TOKENS.findall(expression):
        if token[0] in "*+{":
            last = _REPEAT if last == 1 else math.inf
        elif token[0] == "?":
            last += 1
        elif token == "|":
            others, ways, last = max(2.0, others + ways * last - 1), 1.0, 1.0  # plain ones are two together
        elif token in _OPENING:
            around.append((others, ways * last))
            others, ways, last = 1.0, 1.0, 1.0
        elif token == ")" and around:
            last = others + ways * last - 1
            others, ways = around.pop()
        elif token in (")", "(?", "["):  # what this does not read, such as flags
            return math.inf
        else:
            ways, last = ways * last, 1.0
    return math.inf if around else others + ways * last - 1


_REPEAT = 16.0  # ways to match a repeat in a name, if it has several: the order of their ends is known
_MOST_WAYS = _REPEAT**5
_OPENING = ("(", "(?:", "(?=", "(?!", "(?<=", "(?<!")
_TOKENS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?(?:[:=!]|<[=!])?|(?:[*+?]|\{[\d,]*\})[?+]?|.", re.DOTALL)

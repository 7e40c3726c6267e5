"""Which names a pattern matches: an expression the whole name, an entry of a list the name or an end of it."""

import re
from collections.abc import Iterable, Sequence
from itertools import chain


def matched_whole(expression: str, names: Sequence[str]) -> list[str]:
    """Return the names that an expression matches whole: none if it is no expression."""
    try:
        return [name for name in names if re.fullmatch(expression, name)]
    except re.error:
        return []


def ending_in(names: Iterable[str], entries: Iterable[str]) -> list[str]:
    """Return the names that are one of these entries, or end in one."""
    wanted = set(entries)
    return [name for name in names if not wanted.isdisjoint(_ends_of_one(name))]


def ends_of(names: Iterable[str]) -> list[str]:
    """Return all list entries that would match one of the names: full names and their ends, each once."""
    ends = map(_ends_of_one, names)
    return list(dict.fromkeys(chain.from_iterable(ends)))


def _ends_of_one(name: str) -> list[str]:
    ends = [name]
    while "." in ends[-1]:
        ends.append(ends[-1].partition(".")[2])
    return ends


def last_two(name: str) -> str:
    """Return the last two components of a name."""
    return ".".join(name.split(".")[-2:])

"""Names that are similar to an entry which matches nothing, and the ends of names."""

import difflib
from collections.abc import Iterable
from itertools import chain

_MOST_SIMILAR = 5


def similar_names(entries: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return a few names, or their ends, that are similar to these entries, each once."""
    names_by_end = _names_by_end(names)
    similar: list[str] = []
    shown: set[str] = set()
    for entry in entries:
        for end in difflib.get_close_matches(entry, names_by_end, n=3, cutoff=0.5):
            names_with_end = names_by_end[end]
            if not shown.issuperset(names_with_end):
                shown.update(names_with_end)
                similar.append(_end_of_some(end, names_with_end))
    return similar[:_MOST_SIMILAR]


def _end_of_some(end: str, names: list[str]) -> str:
    """A name, or the end of several."""
    first_name = names[0]
    if len(names) == 1:
        return repr(first_name)
    return f"{end!r} ({len(names)} of them, such as {first_name!r})"


def _names_by_end(names: Iterable[str]) -> dict[str, list[str]]:
    """The names by what one may write for them: all of it, or the last component or two."""
    by_end: dict[str, list[str]] = {}
    for name in names:
        for end in {name, last_two(name), last_component(name)}:
            by_end.setdefault(end, []).append(name)
    return by_end


# Ends of names


def ends_of(names: Iterable[str]) -> list[str]:
    """Return all list entries that would match one of the names: full names and their ends, each once."""
    ends = map(_ends_of_one, names)
    return list(dict.fromkeys(chain.from_iterable(ends)))


def _ends_of_one(name: str) -> list[str]:
    ends = [name]
    while "." in ends[-1]:
        ends.append(ends[-1].partition(".")[2])
    return ends


def ending_in(names: Iterable[str], entries: Iterable[str]) -> list[str]:
    """Return the names that are one of these entries, or end in one."""
    wanted = set(entries)
    return [name for name in names if not wanted.isdisjoint(_ends_of_one(name))]


def last_component(name: str) -> str:
    """Return the last component of a name."""
    return name.rpartition(".")[2]


def last_two(name: str) -> str:
    """Return the last two components of a name."""
    return ".".join(name.split(".")[-2:])

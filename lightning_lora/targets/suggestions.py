"""What an entry that matches nothing was perhaps meant to be: several names, an expression, or a similar name."""

import difflib
import re
from collections.abc import Iterable, Sequence

from lightning_lora.targets.matching import ends_of, last_two, matched_whole
from lightning_lora.tensors.names import last_component

_BETWEEN_COMMAS = re.compile(r"[^,\s](?:[^,]*[^,\s])?")
"""A text between commas, without the spaces around it."""

_BESIDE_NAME = re.compile(r" +[\[(].*$")
"""What a table says behind a name: its parts, and how many layers are like it, as ``(x2)``."""

_RANGES = re.compile(r"(?!\d+$)\d+(-\d+)?(,\d+(-\d+)?)*")
"""Numbers of blocks, as a table groups them: ``0,2-5``. A single number is no match."""

_MOST_SIMILAR = 5


# Several names in one entry


def names_between_commas(entries: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the names that entries hold between commas, as one string for several of them."""
    ends = set(ends_of(names))
    found: list[str] = []
    for entry in entries:
        parts = _BETWEEN_COMMAS.findall(entry)
        if len(parts) > 1 and ends.issuperset(parts):
            found += parts
    return found


# Similar names


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
    """The names by what one may write for them: the whole name, or its last component or two.

    ``layers.0.attn.q_proj`` is there by itself, by ``attn.q_proj`` and by ``q_proj``.
    """
    by_end: dict[str, list[str]] = {}
    for name in names:
        for end in {name, last_two(name), last_component(name)}:
            by_end.setdefault(end, []).append(name)
    return by_end


# An expression, a name with ``*``, or a row of a table


def expressions_meant(
    entries: Iterable[str], names: Sequence[str], wildcard: str
) -> dict[str, str]:
    """Return the expressions that entries may have been meant as, by entry: those that match a name.

    An entry means whole names and ends of names. So the expression for whole names is
    enough if no other name ends so.
    """
    meant = {}
    for entry in entries:
        expression, ending = _guessed_expressions(entry, wildcard)
        names_with_end = matched_whole(ending, names)
        if names_with_end:
            is_enough = matched_whole(expression, names) == names_with_end
            meant[entry] = expression if is_enough else ending
    return meant


def _guessed_expressions(entry: str, wildcard: str) -> tuple[str, str]:
    """What an entry may have been meant as: an expression for whole names, and one for their ends."""
    if "|" in entry:  # it is an expression already, with alternatives
        return entry, as_end(f"({entry})")
    if "\\" in entry:  # likewise, with a dot for example
        return entry, as_end(entry)
    name = _BESIDE_NAME.sub("", entry)
    components = [
        _guessed_component(component, wildcard) for component in name.split(".")
    ]
    expression = r"\.".join(components)
    return expression, as_end(expression)


def _guessed_component(component: str, wildcard: str) -> str:
    """A component of a name as an expression: alternatives for a range, and wildcards for stars."""
    if _RANGES.fullmatch(component):
        return f"({'|'.join(map(str, _numbers(component)))})"
    return escaped(component).replace(r"\*", wildcard)


def as_end(expression: str) -> str:
    r"""Return the expression for names that end as this one says: ``(.*\.)?q_proj`` for ``q_proj``.

    Alternatives must be in a group: ``(q_proj|v_proj)``.

    Users copy it: it is shorter than that of :func:`lightning_lora.patterns.ending`.
    """
    return rf"(.*\.)?{expression}"


def escaped(name: str) -> str:
    """Return the expression that matches this name alone, as it is easy to read."""
    return re.escape(name).replace(r"\-", "-")


def _numbers(ranges: str) -> list[int]:
    """The numbers in ranges such as ``0,2-5``."""
    numbers: list[int] = []
    for run in ranges.split(","):
        ends = run.split("-")  # of a single number, both are the same
        numbers += range(int(ends[0]), int(ends[-1]) + 1)
    return numbers

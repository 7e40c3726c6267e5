"""What a pattern that matches nothing was perhaps meant to be: names in one string, a wildcard, a row of a table."""

import re
from collections.abc import Iterable, Sequence

from lightning_lora.config import matches

_EXPRESSIONS = ("target_modules", "exclude_modules")  # the arguments that are one expression, or a list of names
_KEYS = ("rank_pattern", "alpha_pattern", "target_slices", "trainable_token_indices")  # and those with a key each
_BESIDE = re.compile(r" +[\[(].*$")  # what a table says behind a name: its parts, and how many layers are like it
_RANGE = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")  # numbers of blocks, as a table groups them


def several_names(argument: str, entries: Iterable[str], known: Sequence[str]) -> str:
    """Say how to write several names, if an entry holds them between commas."""
    names = list[str]()
    for entry in entries:
        parts = [part.strip() for part in entry.split(",") if part.strip()]
        if len(parts) > 1 and all(any(matches(part, name) for name in known) for part in parts):
            names += parts
    if not names:
        return ""
    if argument in _KEYS:
        return f"For several names, write a key for each: {', '.join(map(repr, names))}."
    return f"For several names, write a list: {argument}={names}. In YAML: [{', '.join(names)}]."


def wildcards(argument: str, given: str | Sequence[str], missing: Iterable[str], known: Sequence[str]) -> str:
    """Say how to write an expression, if an entry is one, or a name with ``*``, or a row of a table."""
    one_part = ".*" if argument in (*_EXPRESSIONS, *_KEYS) else "[^.]*"
    found = dict[str, str]()
    for entry in missing:
        expression = _expression(entry, one_part)
        for tried in (expression, rf"(.*\.)?{expression}"):
            if entry not in found and expression != re.escape(entry) and _matching(tried, known):
                found[entry] = tried
    if not found:
        return ""
    if isinstance(given, str):
        starred = '"*" is no wildcard in an expression; ".*" is. ' if "*" in given else ""
        return f'{starred}Perhaps write {argument}=r"{found[given]}".'
    said = '"*" is no wildcard in a name. ' if any("*" in entry for entry in found) else ""
    if argument in _EXPRESSIONS:
        everything = "|".join(found.get(entry) or rf"(.*\.)?{_escaped(entry)}" for entry in given)
        return f'{said}Write one regular expression, and no list: {argument}=r"{everything}".'
    if argument in _KEYS:
        keys = ", ".join(f'r"{expression}"' for expression in found.values())
        return f"{said}Write a regular expression as the key: {keys}."
    meant = list(dict.fromkeys(name for expression in found.values() for name in _matching(expression, known)))
    return f"{said}Write the names: {argument}={meant}." if len(meant) <= 20 else f"{said}Write names, or their ends."


def _matching(expression: str, known: Sequence[str]) -> list[str]:
    try:
        return [name for name in known if re.fullmatch(expression, name)]
    except re.error:
        return []


def _expression(entry: str, wildcard: str) -> str:
    """An entry of a list as the expression that it may have been meant as."""
    if "\\" in entry or "|" in entry:  # it is one already
        return entry
    parts = list[str]()
    for part in _BESIDE.sub("", entry).split("."):
        if _RANGE.fullmatch(part) and not part.isdigit():
            parts.append(f"({'|'.join(map(str, _numbers(part)))})")
        else:
            parts.append(wildcard.join(map(_escaped, part.split("*"))))
    return r"\.".join(parts)


def _escaped(name: str) -> str:
    return re.escape(name).replace(r"\-", "-")


def _numbers(part: str) -> list[int]:
    """The numbers in a range such as ``0,2-5``."""
    numbers = list[int]()
    for run in part.split(","):
        first, _, last = run.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers

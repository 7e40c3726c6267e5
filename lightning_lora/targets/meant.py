"""What a pattern that matches nothing was perhaps meant to be: names in one string, a wildcard, a row of a table."""

import re
from collections.abc import Iterable, Mapping, Sequence

from lightning_lora.patterns import matches

_EXPRESSIONS = ("target_modules", "exclude_modules")
"""The arguments that are one regular expression, or a list of names."""

_KEYS = ("rank_pattern", "alpha_pattern", "target_slices", "trainable_token_indices")
"""The arguments that have a key for each layer: an expression, or a name."""

_NAMES_ALONE = ("modules_to_save", "target_parameters")
"""The arguments that are a list of names, and no expression."""

_BETWEEN_COMMAS = re.compile(r"[^,\s](?:[^,]*[^,\s])?")
"""A text between commas, without the spaces around it."""

_BESIDE_NAME = re.compile(r" +[\[(].*$")
"""What a table says behind a name: its parts, and how many layers are like it."""

_RANGE = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
"""Numbers of blocks, as a table groups them: ``0,2-5``."""

_MOST_NAMES = 20


# Names between commas


def several_names(argument: str, entries: Iterable[str], names: Sequence[str]) -> str:
    """Say how to write several names, if an entry holds them between commas."""
    found: list[str] = []
    for entry in entries:
        parts = _BETWEEN_COMMAS.findall(entry)
        if len(parts) > 1 and all(_matches_any(part, names) for part in parts):
            found += parts
    if not found:
        return ""
    if argument in _KEYS:
        return f"For several names, write a key for each: {', '.join(map(repr, found))}."
    return f"For several names, write a list: {argument}={found}. In YAML: [{', '.join(found)}]."


def _matches_any(entry: str, names: Sequence[str]) -> bool:
    return any(matches(entry, name) for name in names)


# Wildcards, and rows of tables


def wildcards(argument: str, given: str | Sequence[str], missing: Iterable[str], names: Sequence[str]) -> str:
    """Say how to write an expression, if an entry is one, or a name with ``*``, or a row of a table.

    ``given`` is the whole argument, of which the ``missing`` entries match nothing.
    """
    expressions = _expressions_meant(argument, missing, names)
    if not expressions:
        return ""
    if isinstance(given, str):
        advice = f'Perhaps write {argument}=r"{expressions[given]}".'
        about_star = '"*" is no wildcard in an expression; ".*" is. '
    else:
        advice = _instead_of_entries(argument, given, expressions, names)
        about_star = '"*" is no wildcard in a name. '
    if "*" in "".join(expressions):
        return about_star + advice
    return advice


def _instead_of_entries(
    argument: str, given: Sequence[str], expressions: Mapping[str, str], names: Sequence[str]
) -> str:
    """What to write instead of entries that were meant as these expressions, in the argument's own form."""
    if argument in _EXPRESSIONS:
        alternatives = [expressions.get(entry, _as_end(_escaped(entry))) for entry in given]
        return f'Write one regular expression, and no list: {argument}=r"{"|".join(alternatives)}".'
    if argument in _KEYS:
        keys = [f'r"{expression}"' for expression in expressions.values()]
        return f"Write a regular expression as the key: {', '.join(keys)}."
    matching: dict[str, None] = {}  # each name once
    for expression in expressions.values():
        matching |= dict.fromkeys(_matching(expression, names))
    if len(matching) > _MOST_NAMES:
        return "Write names, or their ends."
    return f"Write the names: {argument}={list(matching)}."


def _expressions_meant(argument: str, entries: Iterable[str], names: Sequence[str]) -> dict[str, str]:
    """The expressions that entries may have been meant as, by entry: those that match a name."""
    wildcard = "[^.]*" if argument in _NAMES_ALONE else ".*"
    meant = {}
    for entry in entries:
        expression = _as_expression(entry, wildcard)
        if expression == _escaped(entry):  # a plain name, which matches nothing
            continue
        if _matching(expression, names):
            meant[entry] = expression
        elif _matching(_as_end(expression), names):
            meant[entry] = _as_end(expression)
    return meant


def _matching(expression: str, names: Sequence[str]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(expression, name)]
    except re.error:
        return []


def _as_expression(entry: str, wildcard: str) -> str:
    """An entry of a list as the expression that it may have been meant as."""
    if "\\" in entry or "|" in entry:  # it is one already
        return entry
    name = _BESIDE_NAME.sub("", entry)
    components = [_component_as_expression(component, wildcard) for component in name.split(".")]
    return r"\.".join(components)


def _component_as_expression(component: str, wildcard: str) -> str:
    """A component of a name as an expression: alternatives for a range, and wildcards for stars."""
    if _RANGE.fullmatch(component) and not component.isdigit():
        return f"({'|'.join(map(str, _numbers(component)))})"
    texts = [_escaped(text) for text in component.split("*")]
    return wildcard.join(texts)


def _as_end(expression: str) -> str:
    """The expression for names that end as this one says."""
    return rf"(.*\.)?{expression}"


def _escaped(name: str) -> str:
    return re.escape(name).replace(r"\-", "-")


def _numbers(component: str) -> list[int]:
    """The numbers in a range such as ``0,2-5``."""
    numbers: list[int] = []
    for run in component.split(","):
        ends = run.split("-")  # of a single number, both are the same
        numbers += range(int(ends[0]), int(ends[-1]) + 1)
    return numbers

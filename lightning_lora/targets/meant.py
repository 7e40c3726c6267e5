"""What a pattern that matches nothing was perhaps meant to be: names in one string, a wildcard, a row of a table."""

import re
from collections.abc import Iterable, Mapping, Sequence

from lightning_lora.targets.near_misses import ends_of

_BETWEEN_COMMAS = re.compile(r"[^,\s](?:[^,]*[^,\s])?")
"""A text between commas, without the spaces around it."""

_BESIDE_NAME = re.compile(r" +[\[(].*$")
"""What a table says behind a name: its parts, and how many layers are like it."""

_RANGES = re.compile(r"(?!\d+$)\d+(-\d+)?(,\d+(-\d+)?)*")
"""Numbers of blocks, as a table groups them: ``0,2-5``. A single number is none."""

_MOST_NAMES = 20


def several_names(argument: str, entries: Iterable[str], names: Sequence[str]) -> str:
    """Say how to write several names, if an entry holds them between commas."""
    ends = set(ends_of(names))
    found: list[str] = []
    for entry in entries:
        parts = _BETWEEN_COMMAS.findall(entry)
        if len(parts) > 1 and ends.issuperset(parts):
            found += parts
    if not found:
        return ""
    return f"For several names, write {_FORMS[argument].written(found)}."


def wildcards(argument: str, given: str | Sequence[str], missing: Iterable[str], names: Sequence[str]) -> str:
    """Say how to write an expression, if an entry is one, or a name with ``*``, or a row of a table.

    ``given`` is the whole argument, of which the ``missing`` entries match nothing.
    """
    form = _FORMS[argument]
    expressions = _expressions_meant(missing, names, form.wildcard)
    if not expressions:
        return ""
    if isinstance(given, str):
        advice = f'Perhaps write {argument}=r"{expressions[given]}".'
        about_star = '"*" is no wildcard in an expression; ".*" is. '
    else:
        advice = form.instead(given, expressions, names)
        about_star = '"*" is no wildcard in a name. '
    if "*" in "".join(expressions):
        return about_star + advice
    return advice


# How arguments are written


class _ExpressionOrNames:
    """An argument that is one regular expression, or a list of names."""

    wildcard = ".*"

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def written(self, found: list[str]) -> str:
        """Several names in this form."""
        return f"a list: {self.argument}={found}. In YAML: [{', '.join(found)}]"

    def instead(self, given: Sequence[str], expressions: Mapping[str, str], names: Sequence[str]) -> str:
        """What to write instead of the ``given`` entries, some of which were meant as these expressions."""
        alternatives = [expressions.get(entry, _as_end(_escaped(entry))) for entry in given]
        return f'Write one regular expression, and no list: {self.argument}=r"{"|".join(alternatives)}".'


class _OnlyNames(_ExpressionOrNames):
    """One that is a list of names, and no expression."""

    wildcard = "[^.]*"

    def instead(self, given: Sequence[str], expressions: Mapping[str, str], names: Sequence[str]) -> str:
        matching: dict[str, None] = {}  # each name once
        for expression in expressions.values():
            matching |= dict.fromkeys(matched_whole(expression, names))
        if len(matching) > _MOST_NAMES:
            return "Write names, or their ends."
        return f"Write the names: {self.argument}={list(matching)}."


class _Keys(_ExpressionOrNames):
    """One that has a key for each layer: an expression, or a name."""

    def written(self, found: list[str]) -> str:
        return f"a key for each: {', '.join(map(repr, found))}"

    def instead(self, given: Sequence[str], expressions: Mapping[str, str], names: Sequence[str]) -> str:
        keys = [f'r"{expression}"' for expression in expressions.values()]
        return f"Write a regular expression as the key: {', '.join(keys)}."


_FORMS = {
    "target_modules": _ExpressionOrNames("target_modules"),
    "exclude_modules": _ExpressionOrNames("exclude_modules"),
    "modules_to_save": _OnlyNames("modules_to_save"),
    "target_parameters": _OnlyNames("target_parameters"),
    "rank_pattern": _Keys("rank_pattern"),
    "alpha_pattern": _Keys("alpha_pattern"),
    "target_slices": _Keys("target_slices"),
    "trainable_token_indices": _Keys("trainable_token_indices"),
}


# Expressions


def _expressions_meant(entries: Iterable[str], names: Sequence[str], wildcard: str) -> dict[str, str]:
    """The expressions that entries may have been meant as, by entry: those that match a name."""
    meant = {}
    for entry in entries:
        expression = _as_expression(entry, wildcard)
        if matched_whole(expression, names):
            meant[entry] = expression
        elif matched_whole(_as_end(expression), names):
            meant[entry] = _as_end(expression)
    return meant


def matched_whole(expression: str, names: Sequence[str]) -> list[str]:
    """Return the names that an expression matches whole: none if it is no expression."""
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
    if _RANGES.fullmatch(component):
        return f"({'|'.join(map(str, _numbers(component)))})"
    return _escaped(component).replace(r"\*", wildcard)


def _as_end(expression: str) -> str:
    """The expression for names that end as this one says."""
    return rf"(.*\.)?{expression}"


def _escaped(name: str) -> str:
    return re.escape(name).replace(r"\-", "-")


def _numbers(ranges: str) -> list[int]:
    """The numbers in ranges such as ``0,2-5``."""
    numbers: list[int] = []
    for run in ranges.split(","):
        ends = run.split("-")  # of a single number, both are the same
        numbers += range(int(ends[0]), int(ends[-1]) + 1)
    return numbers

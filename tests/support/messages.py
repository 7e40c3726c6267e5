"""What was said: lines of a log, and warnings."""

from collections.abc import Iterable
from typing import Any


def lines_with(text: str, lines: Iterable[str]) -> list[str]:
    """The lines, or messages, in which a text is."""
    return [line for line in lines if text in line]


def messages_of(caught: Iterable[Any], category: type[Warning] = Warning) -> list[str]:
    """What warnings of a class say, of those that were caught."""
    return [str(each.message) for each in caught if issubclass(each.category, category)]

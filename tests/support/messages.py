"""What was said: lines of a log, and warnings."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any
from warnings import WarningMessage


def lines_with(text: str, lines: Iterable[str]) -> list[str]:
    """The lines, or messages, in which a text is."""
    return [line for line in lines if text in line]


def assert_in_text(parts: Iterable[str], text: str) -> None:
    """Expect all these parts in a text."""
    for part in parts:
        assert part in text, part


def warned_by(
    call: Callable[..., object], *args: Any, **kwargs: Any
) -> list[WarningMessage]:
    """The warnings of a call, each of them every time."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, **kwargs)
    return caught


def messages_of(caught: Iterable[Any], category: type[Warning] = Warning) -> list[str]:
    """What warnings of a class say, of those that were caught."""
    return [str(each.message) for each in caught if issubclass(each.category, category)]

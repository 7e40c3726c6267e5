"""What the arguments of LoRA may be: each function refuses what is not valid, by the argument's name.

Those with ``checked_`` also return what is kept: a copy of plain types, which later changes of the argument, and files
that are loaded safely, leave as it is.
"""

import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from lightning_lora.errors import ConfigError
from lightning_lora.patterns import ending

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 200
brief = _shortener.repr
"""How an error shows a value that may be long."""


# Numbers and words


def check_rank(name: str, value: object) -> None:
    """Refuse what is no rank."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={brief(value)} is not a valid rank. Expected an integer of at least 1, such as r=8.")


def check_alpha(name: str, value: object) -> None:
    """Refuse what is no finite number above zero."""
    if not _is_number(value) or value <= 0:  # type: ignore[operator]  # a number, as just checked
        raise ConfigError(f"{name}={brief(value)} is not valid. Expected a finite number above 0, such as alpha=16.")


def check_dropout(name: str, value: object) -> None:
    """Refuse what is no probability, and the one that drops all."""
    if not _is_number(value) or not 0 <= value < 1:  # type: ignore[operator]  # a number, as just checked
        raise ConfigError(f"{name}={brief(value)} is not valid. Expected a number that is at least 0 and below 1.")


def check_batches(name: str, value: object) -> None:
    """Refuse what is no number of batches."""
    if type(value) is not int or value < 1:
        raise ConfigError(f"{name}={brief(value)} is not valid. Expected an integer of at least 1.")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is none of these words or flags."""
    if not isinstance(value, str | bool) or value not in choices:
        expected = ", ".join(map(repr, choices))
        raise ConfigError(f"{name}={brief(value)} is not valid. Expected one of {expected}.")


def _is_number(value: object) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def python_number(value: float) -> float:
    """Make a number Python's own: files that are loaded safely cannot hold numpy's."""
    return value if type(value) is int else float(value)


# Names and expressions


def is_given(value: object) -> bool:
    """Whether an optional pattern is given: an empty list or dict counts as None."""
    if isinstance(value, Sequence | Mapping | Set):
        return len(value) > 0
    return value is not None


def check_is_list(name: str, value: object) -> None:
    """Refuse a string where only a list has a meaning."""
    if isinstance(value, str):
        raise ConfigError(f"{name}={value!r} is a string. Expected a list of names.")


def checked_names(name: str, value: object) -> str | tuple[str, ...]:
    """Return a regular expression as it is, or names as a tuple."""
    if isinstance(value, str) and value:
        _check_expression(name, value)
        return value
    if not isinstance(value, Sequence | Set) or not value or not all(map(_is_name, value)):
        raise ConfigError(f"{name}={brief(value)} is not valid. Expected a regular expression or a list of names.")
    entries = sorted(value) if isinstance(value, Set) else value
    return tuple(map(str, entries))


def _is_name(entry: object) -> bool:
    return isinstance(entry, str) and entry != ""


_NO_EXPRESSION = (re.error, RecursionError, OverflowError)
"""What ``re.compile`` raises."""


def _check_expression(name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except _NO_EXPRESSION as error:
        raise ConfigError(
            f"{name}={expression!r} is not a regular expression ({error}). Correct it, or give a list of names: "
            f"{name}=[{expression!r}]."
        ) from error


def _check_ending(name: str, key: str) -> None:
    """Refuse an expression that is none after the components of a name."""
    try:
        ending(key)
    except _NO_EXPRESSION as error:
        raise ConfigError(f"{name}={key!r} is not a regular expression ({error}). Correct it.") from error


def _check_keys(name: str, value: object, values: str) -> None:
    """Refuse what is no dict from names, or expressions, to ``values``."""
    if not isinstance(value, Mapping) or not all(map(_is_name, value)):
        raise ConfigError(f"{name}={brief(value)} is not valid. Expected a dict from names to {values}.")
    for key in value:
        _check_expression(name, key)
        _check_ending(name, key)


# Numbers by name


def _checked_ranks(name: str, value: Any) -> dict[str, float]:
    return _checked_numbers(name, value, check_rank)


def _checked_alphas(name: str, value: Any) -> dict[str, float]:
    return _checked_numbers(name, value, check_alpha)


def _checked_numbers(name: str, value: Any, check: Callable[[str, object], None]) -> dict[str, float]:
    _check_keys(name, value, "values, such as {'query': 4}")
    for key, number in value.items():
        check(f"{name}[{key!r}]", number)
    return {str(key): python_number(number) for key, number in value.items()}


# Parts of layers


def _checked_slices(name: str, value: Any) -> dict[str, Any]:
    """Layers with the names of their parts, as tuples, or with names and rows."""
    _check_keys(name, value, "parts, such as {'c_attn': ['q', 'v']}")
    return {str(key): _checked_parts(f"{name}[{key!r}]", parts) for key, parts in value.items()}


def _checked_parts(name: str, parts: Any) -> tuple[str, ...] | dict[str, tuple[int, int]]:
    if not _are_parts(parts):
        raise ConfigError(
            f"{name}={brief(parts)} is not valid. Expected names of parts, such as ['q', 'v'], or a dict from names "
            "to rows, such as {'q': [0, 64]}."
        )
    if isinstance(parts, Mapping):
        return _checked_ranges(name, parts)
    part_names = sorted(parts) if isinstance(parts, Set) else parts
    return tuple(dict.fromkeys(part_names))


def _are_parts(parts: object) -> bool:
    if isinstance(parts, str) or not isinstance(parts, Sequence | Set | Mapping):
        return False
    return len(parts) > 0 and all(isinstance(part, str) and part.isidentifier() for part in parts)


def _checked_ranges(name: str, parts: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Ranges of rows by name. No row is in two of them."""
    ranges: dict[str, tuple[int, int]] = {}
    for part, rows in parts.items():
        first, end = _checked_range(f"{name}[{part!r}]", rows)
        if any(first < other_end and other_first < end for other_first, other_end in ranges.values()):
            raise ConfigError(f"{name}={brief(parts)} has parts that share rows. Expected ranges without overlap.")
        ranges[part] = (first, end)
    return ranges


def _checked_range(name: str, rows: Any) -> tuple[int, int]:
    if isinstance(rows, Sequence) and [type(row) for row in rows] == [int, int]:
        first, end = rows
        if 0 <= first < end:
            return first, end
    raise ConfigError(f"{name}={brief(rows)} is not a range of rows. Expected [first, end], such as [0, 64].")


# Rows of embeddings


def _checked_tokens(name: str, value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Rows in their order; or those of each embedding by name."""
    if not isinstance(value, Mapping):
        return _checked_rows(name, value)
    _check_keys(name, value, "rows, such as {'embed_tokens': [50257, 50258]}")
    return {str(key): _checked_rows(f"{name}[{key!r}]", rows) for key, rows in value.items()}


def _checked_rows(name: str, value: Any) -> tuple[int, ...]:
    if not _are_rows(value):
        raise ConfigError(
            f"{name}={brief(value)} is not valid. Expected numbers of rows, each once, such as [50257]. (Of a token: "
            "tokenizer.convert_tokens_to_ids.)"
        )
    return tuple(sorted(value))


def _are_rows(value: Any) -> bool:
    if not isinstance(value, list | tuple | range | Set):
        return False
    types = {type(row) for row in value}
    return types == {int} and min(value) >= 0 and len(set(value)) == len(value)


PATTERNS: dict[str, Callable[[str, Any], Any]] = {
    "exclude_modules": checked_names,
    "modules_to_save": checked_names,
    "target_parameters": checked_names,
    "target_slices": _checked_slices,
    "trainable_token_indices": _checked_tokens,
    "rank_pattern": _checked_ranks,
    "alpha_pattern": _checked_alphas,
}
"""The optional arguments that mean layers, with what checks them."""

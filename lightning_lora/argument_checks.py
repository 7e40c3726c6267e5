"""What the arguments of LoRA may be: each function refuses what is not valid, by the argument's name.

Those with ``checked_`` also return what is kept: a copy of plain types, which later
changes of the argument, and files that are loaded safely, leave as it is.
"""

import re
import reprlib
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, Literal, get_args

from lightning_lora.errors import ConfigError
from lightning_lora.patterns import ending

Bias = Literal["none", "all", "lora_only"]
Init = Literal["kaiming", "gaussian", "pissa", "olora", "eva", "lora_ga"]
# two types: of a single one, jsonargparse would say that it expects "a bool"
Merge = Literal["last", "best"] | Literal[False]
Save = Literal["adapters", "model"]

_shortener = reprlib.Repr()
_shortener.maxstring = _shortener.maxother = 200
brief = _shortener.repr
"""How an error shows a value that may be long."""

# takes an argument's name and its value, and returns what is kept
_Check = Callable[[str, Any], Any]
_Rows = tuple[int, ...]  # the numbers of single rows
_Range = tuple[int, int]  # the first row of a part, and the one after its last


def _expect(
    is_valid: bool,
    name: str,
    value: object,
    expected: str,
    *,
    found: str = "is not valid",
) -> None:
    """Refuse a value that is not valid, and say what was expected."""
    if not is_valid:
        what_is_wrong = f"{name}={brief(value)} {found}"
        raise ConfigError(f"{what_is_wrong}. Expected {expected}.")


# Numbers and words


def checked_rank(name: str, value: Any) -> int:
    """Return an integer of at least one."""
    is_rank = _is_numeric(value, int) and value >= 1
    _expect(
        is_rank,
        name,
        value,
        "an integer of at least 1, such as r=8",
        found="is not a valid rank",
    )
    return int(value)


def checked_alpha(name: str, value: Any) -> float:
    """Return a finite number above zero."""
    is_alpha = _is_number(value) and value > 0
    _expect(is_alpha, name, value, "a finite number above 0, such as alpha=16")
    return _python_number(value)


def checked_dropout(name: str, value: Any) -> float:
    """Return a probability that does not drop all."""
    is_dropout = _is_number(value) and 0 <= value < 1
    _expect(is_dropout, name, value, "a number that is at least 0 and below 1")
    return _python_number(value)


def check_batches(name: str, value: object) -> None:
    """Refuse what is no number of batches."""
    # a subclass of int is refused, because the value is kept as it is
    is_count = type(value) is int and value >= 1
    _expect(is_count, name, value, "an integer of at least 1")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse what is none of these words or flags."""
    is_choice = isinstance(value, str | bool) and value in choices
    words = ", ".join(map(repr, choices))
    _expect(is_choice, name, value, f"one of {words}")


def check_adapter_name(value: object) -> None:
    """Refuse what is no name of an adapter."""
    _expect(_is_name(value), "name", value, "a string that is not empty")


def check_merge(value: object) -> None:
    """Refuse what says no way to end a fit."""
    is_merge = value is False or value in ("last", "best")
    _expect(is_merge, "merge", value, "'last', 'best' or False")


def check_save(value: object) -> None:
    """Refuse what says no content of a Trainer's files."""
    is_save = value in get_args(Save)
    _expect(is_save, "save", value, "'adapters' or 'model'")


def _is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return _is_numeric(value, int | float) and abs(value) <= sys.float_info.max


def _is_numeric(value: object, kind: Any) -> bool:
    """Whether it is a number of this kind: a flag is none, though Python takes it for an integer."""
    return isinstance(value, kind) and not isinstance(value, bool)


def _python_number(value: float) -> float:
    """Make a number Python's own: files that are loaded safely cannot hold numpy's."""
    return value if type(value) is int else float(value)


# Names and expressions


def is_given(value: object) -> bool:
    """Whether an optional argument is given: an empty list or dict counts as None."""
    if isinstance(value, Sequence | Mapping | Set):
        return len(value) > 0
    return value is not None


def check_is_list(name: str, value: object) -> None:
    """Refuse a string where only a list has a meaning."""
    if isinstance(value, str):
        names = [entry.strip() for entry in value.split(",")]
        in_python = f"{name}={names}"
        in_yaml = ", ".join(names)
        raise ConfigError(
            f"{name}={value!r} is a string. Expected a list of names: {in_python}. In "
            f"YAML: [{in_yaml}]."
        )


def checked_names(name: str, value: object) -> str | tuple[str, ...]:
    """Return a regular expression as it is, or names as a tuple."""
    if isinstance(value, str) and value:
        _check_expression(name, value)
        return value
    are_names = (
        isinstance(value, Sequence | Set)
        and len(value) > 0
        and all(map(_is_name, value))
    )
    _expect(are_names, name, value, "a regular expression or a list of names")
    return tuple(map(str, _in_order(value)))


def _is_name(entry: object) -> bool:
    """Whether it is a text that is not empty."""
    return isinstance(entry, str) and entry != ""


def _in_order(entries: Any) -> Any:
    """Entries in an order that is always the same: a set has none."""
    return sorted(entries) if isinstance(entries, Set) else entries


_NO_EXPRESSION = (re.error, RecursionError, OverflowError)
"""What ``re.compile`` raises."""


def _check_expression(name: str, expression: str) -> None:
    """Refuse what is no regular expression."""
    try:
        re.compile(expression)
    except _NO_EXPRESSION as error:
        raise _expression_error(
            name, expression, error, _remedy(name, expression)
        ) from error


def _check_key(name: str, key: str) -> None:
    """Refuse a key that is no expression by itself, or none behind the components of a name, as ``(?i)q``."""
    _check_expression(name, key)
    try:
        ending(key)
    except _NO_EXPRESSION as error:
        raise _expression_error(name, key, error) from error


def _expression_error(
    name: str, expression: str, error: Exception, remedy: str = ""
) -> ConfigError:
    return ConfigError(
        f"{name}={expression!r} is not a regular expression ({error}). Correct "
        f"it{remedy}."
    )


def _remedy(name: str, expression: str) -> str:
    """What to write in place of what is no expression.

    Somebody may have taken ``*`` for a wildcard.
    """
    if "*" not in expression:
        return f", or give a list of names: {name}=[{expression!r}]"
    parts = re.split(r"\.?\*", expression)
    with_wildcards = ".*".join(map(re.escape, parts))
    return f': "*" is no wildcard in it. Perhaps write r"{with_wildcards}"'


def _checked_entries(
    name: str, value: Any, check_entry: _Check, expected: str
) -> dict[str, Any]:
    """A dict from names, or expressions for their ends, to checked entries.

    ``expected`` says what entries are.
    """
    has_names = isinstance(value, Mapping) and all(map(_is_name, value))
    _expect(has_names, name, value, f"a dict from names to {expected}")
    entries = dict[str, Any]()
    for key, entry in value.items():
        _check_key(name, key)
        entries[str(key)] = check_entry(f"{name}[{key!r}]", entry)
    return entries


# Numbers by name


_NUMBERS = "values, such as {'query': 4}"


def _checked_ranks(name: str, value: Any) -> dict[str, int]:
    """Ranks by name."""
    return _checked_entries(name, value, checked_rank, _NUMBERS)


def _checked_alphas(name: str, value: Any) -> dict[str, float]:
    """Values of alpha by name."""
    return _checked_entries(name, value, checked_alpha, _NUMBERS)


# Parts of layers


def _checked_slices(name: str, value: Any) -> dict[str, Any]:
    """Layers with the names of their parts, as tuples, or with names and rows."""
    return _checked_entries(
        name, value, _checked_parts, "parts, such as {'c_attn': ['q', 'v']}"
    )


def _checked_parts(name: str, parts: Any) -> tuple[str, ...] | dict[str, _Range]:
    """Names of parts, each once; or the rows of each part."""
    expected = (
        "names of parts, such as ['q', 'v'], or a dict from names to rows, such as "
        "{'q': [0, 64]}"
    )
    _expect(_are_parts(parts), name, parts, expected)
    if isinstance(parts, Mapping):
        return _checked_ranges(name, parts)
    return tuple(dict.fromkeys(_in_order(parts)))


def _are_parts(parts: object) -> bool:
    """Whether these are some names of parts, with or without their rows."""
    if isinstance(parts, str) or not isinstance(parts, Sequence | Set | Mapping):
        return False
    return len(parts) > 0 and all(map(_is_part, parts))


def _is_part(part: object) -> bool:
    """Whether it is the name of a part."""
    return isinstance(part, str) and part.isidentifier()


def _checked_ranges(name: str, parts: Mapping[str, Any]) -> dict[str, _Range]:
    """Ranges of rows by name. No row is in two of them."""
    ranges: dict[str, _Range] = {}
    for part, rows in parts.items():
        checked = _checked_range(f"{name}[{part!r}]", rows)
        if any(_share_rows(checked, other) for other in ranges.values()):
            raise ConfigError(
                f"{name}={brief(parts)} has parts that share rows. Expected ranges "
                "without overlap."
            )
        ranges[part] = checked
    return ranges


def _share_rows(one: _Range, other: _Range) -> bool:
    """Whether two ranges have a row in common."""
    first_shared = max(one[0], other[0])
    end_of_shared = min(one[1], other[1])
    return first_shared < end_of_shared


def _checked_range(name: str, rows: Any) -> _Range:
    """The first row, and the one after the last."""
    are_integers = isinstance(rows, Sequence) and list(map(type, rows)) == [int, int]
    is_range = are_integers and 0 <= rows[0] < rows[1]
    _expect(
        is_range,
        name,
        rows,
        "[first, end], such as [0, 64]",
        found="is not a range of rows",
    )
    first, end = rows
    return first, end


# Rows of embeddings


def _checked_tokens(name: str, value: Any) -> _Rows | dict[str, _Rows]:
    """Rows in their order; or those of each embedding by name."""
    if not isinstance(value, Mapping):
        return _checked_rows(name, value)
    return _checked_entries(
        name, value, _checked_rows, "rows, such as {'embed_tokens': [50257, 50258]}"
    )


def _checked_rows(name: str, value: Any) -> _Rows:
    """Numbers of rows, in their order."""
    if not _are_rows(value):
        raise ConfigError(
            f"{name}={brief(value)} is not valid. Expected numbers of rows, each once, "
            "such as [50257]. (Of a token: tokenizer.convert_tokens_to_ids.)"
        )
    return tuple(sorted(value))


def _are_rows(value: Any) -> bool:
    """Whether these are some numbers from 0 on, each once."""
    if not isinstance(value, list | tuple | range | Set):
        return False
    if set(map(type, value)) != {int}:
        return False
    is_each_once = len(set(value)) == len(value)
    return is_each_once and min(value) >= 0


OPTIONAL: dict[str, _Check] = {
    "exclude_modules": checked_names,
    "modules_to_save": checked_names,
    "target_parameters": checked_names,
    "target_slices": _checked_slices,
    "trainable_token_indices": _checked_tokens,
    "rank_pattern": _checked_ranks,
    "alpha_pattern": _checked_alphas,
}
"""The optional arguments that mean layers, with what checks them."""


def checked_optional(name: str, value: Any) -> Any:
    """Return an optional argument that means layers, checked. An empty one is None."""
    return OPTIONAL[name](name, value) if is_given(value) else None

"""Whether values from a file are as expected, so that they are safe to use."""

from collections.abc import Iterable
from typing import Any

from lightning_lora.errors import AdapterFileError


def fits(value: object, schema: Any) -> bool:
    """Whether ``value`` is as ``schema`` describes it.

    A schema is a type; a function that judges the value; a tuple of alternatives; ``[schema]`` for a list; or
    ``{str: schema}`` for a dictionary with any names.
    """
    if isinstance(schema, type):
        return type(value) is schema
    if isinstance(schema, tuple):
        return any(fits(value, each) for each in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(each, schema[0]) for each in value)
    if isinstance(schema, dict):
        return isinstance(value, dict) and fits(list(value), [str]) and fits(list(value.values()), [schema[str]])
    return bool(schema(value))


def check_named(names: Iterable[object], path: object) -> None:
    """Refuse names of tensors that are no text."""
    for name in names:
        if not isinstance(name, str):
            raise AdapterFileError(f"{path} holds {name!r} as a name. Expected strings: it is damaged or was changed.")

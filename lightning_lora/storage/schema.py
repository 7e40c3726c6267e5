"""Whether values from a file are as expected, so that they are safe to use."""

from collections.abc import Iterable
from typing import Any

from lightning_lora.errors import AdapterFileError


def fits(value: object, schema: Any) -> bool:
    """Whether ``value`` is as ``schema`` describes it.

    A schema is a type; ``None``; a function that judges the value; a tuple of alternatives; ``[schema]`` for a list;
    ``{str: schema}`` for any names; or one for each key, where a key that ends in ``"?"`` may be absent.
    """
    if isinstance(schema, type):
        return type(value) is schema
    if isinstance(schema, tuple):
        return any(fits(value, each) for each in schema)
    if isinstance(schema, list):
        return isinstance(value, list) and all(fits(each, schema[0]) for each in value)
    if isinstance(schema, dict):
        return isinstance(value, dict) and _fields_fit(value, schema)
    return value is None if schema is None else bool(schema(value))


def _fields_fit(value: dict[Any, Any], schema: dict[Any, Any]) -> bool:
    if str in schema:
        return all(type(name) is str and fits(each, schema[str]) for name, each in value.items())
    known = {name.removesuffix("?"): each for name, each in schema.items()}
    required = {name for name in schema if not name.endswith("?")}
    return required <= value.keys() <= known.keys() and all(fits(each, known[name]) for name, each in value.items())


def check_named(names: Iterable[object], path: object) -> None:
    """Refuse names of tensors that are no text."""
    for name in names:
        if not isinstance(name, str):
            raise AdapterFileError(f"{path} holds {name!r} as a name. Expected strings: it is damaged or was changed.")

"""Whether values from a file have the expected form, so that they are safe to use."""

from typing import Any


def fits(value: object, schema: Any) -> bool:
    """Whether ``value`` has the form that ``schema`` describes.

    A schema is a type; ``None``; a function that judges the value; a tuple of alternatives; ``[schema]`` for a list;
    ``{str: schema}`` for a dictionary with any names; or a dictionary with a schema for each key, in which a key that
    ends in ``"?"`` may be absent.

    Example:
        >>> schema = {"name": str, "sizes?": [int]}
        >>> fits({"name": "a"}, schema), fits({"name": "a", "sizes": [1, "2"]}, schema), fits({"sizes": []}, schema)
        (True, False, False)
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

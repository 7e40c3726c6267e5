"""Dicts of things by name, as modules, parameters and layers are.

Each function returns a new dict.
"""

from collections.abc import Callable, Collection, Container, Iterable, Mapping
from typing import Any, TypeVar

from lightning_lora.tensors.names import owner_of

Thing = TypeVar("Thing")
Key = TypeVar("Key")
Kind = TypeVar("Kind")


def dict_or_empty(value: Any) -> dict[str, Any]:
    """Return a value if it is a dict, and otherwise an empty dict: a file may hold anything."""
    return value if isinstance(value, dict) else {}


# Some of the things


def where(
    named: Mapping[str, Thing], holds: Callable[[Thing], object]
) -> dict[str, Thing]:
    """Return those of which a condition holds."""
    return {name: thing for name, thing in named.items() if holds(thing)}


def where_not(
    named: Mapping[str, Thing], holds: Callable[[Thing], object]
) -> dict[str, Thing]:
    """Return those of which a condition does not hold."""
    return {name: thing for name, thing in named.items() if not holds(thing)}


def with_values(
    named: Mapping[str, Thing], things: Container[object]
) -> dict[str, Thing]:
    """Return those that are among these things.

    If they are tensors, give a set or a dict: in a list, ``in`` would compare their
    elements.
    """
    return {name: thing for name, thing in named.items() if thing in things}


def of_type(named: Mapping[str, object], kind: type[Kind]) -> dict[str, Kind]:
    """Return the instances of a class, and of its subclasses."""
    return {name: thing for name, thing in named.items() if isinstance(thing, kind)}


def only(named: Mapping[str, Thing], names: Collection[object]) -> dict[str, Thing]:
    """Return those with these names."""
    return {name: thing for name, thing in named.items() if name in names}


def without(named: Mapping[str, Thing], names: Collection[str]) -> dict[str, Thing]:
    """Return those with other names than these."""
    return {name: thing for name, thing in named.items() if name not in names}


def beginning_with(start: str, named: Mapping[str, Thing]) -> dict[str, Thing]:
    """Return those whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(start): thing
        for name, thing in named.items()
        if name.startswith(start)
    }


# All of them, by other names


def renamed(
    named: Mapping[str, Thing], name_of: Callable[[str], str]
) -> dict[str, Thing]:
    """Return the same things by other names."""
    return {name_of(name): thing for name, thing in named.items()}


def prefixed(prefix: str, named: Mapping[str, Thing]) -> dict[str, Thing]:
    """Return what has these names in the module ``prefix``, by its names in the model."""
    start = f"{prefix}." if prefix else ""
    return {start + name: thing for name, thing in named.items()}


# Grouped by something else than their names


def grouped(
    things: Iterable[Thing], group_of: Callable[[Thing], Key]
) -> dict[Key, list[Thing]]:
    """Return things, such as names, in groups, in their order."""
    groups: dict[Key, list[Thing]] = {}
    for thing in things:
        groups.setdefault(group_of(thing), []).append(thing)
    return groups


def by_owner(tensors: Mapping[str, Thing]) -> dict[str, list[Thing]]:
    """Return tensors by the names of the modules that hold them."""
    by_module = grouped(tensors, owner_of)
    return {
        module: [tensors[name] for name in names] for module, names in by_module.items()
    }


def names_of_each(named: Mapping[str, Key]) -> dict[Key, list[str]]:
    """Return the names of each thing: a shared module or a tied tensor has several."""
    return grouped(named, named.__getitem__)

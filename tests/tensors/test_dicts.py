"""Dicts of things by name: some of them, by other names, or in groups."""

from lightning_lora.tensors.dicts import (
    beginning_with,
    by_owner,
    grouped,
    names_of_each,
    of_type,
    only,
    prefixed,
    renamed,
    where,
    where_not,
    with_values,
    without,
)

NUMBERS = {"a.one": 1, "a.two": 2, "b.one": 1}


def is_odd(number: int) -> bool:
    return number % 2 == 1


def test_some_of_them() -> None:
    assert where(NUMBERS, is_odd) == {"a.one": 1, "b.one": 1}
    assert where_not(NUMBERS, is_odd) == {"a.two": 2}
    assert with_values(NUMBERS, {2, 3}) == {"a.two": 2}
    assert only(NUMBERS, ["b.one", "other"]) == {"b.one": 1}
    assert without(NUMBERS, ["b.one", "other"]) == {"a.one": 1, "a.two": 2}
    assert of_type({"a": 1, "b": "word"}, str) == {"b": "word"}
    assert beginning_with("a.", NUMBERS) == {"one": 1, "two": 2}


def test_other_names() -> None:
    assert renamed(NUMBERS, str.upper) == {"A.ONE": 1, "A.TWO": 2, "B.ONE": 1}
    assert prefixed("net", {"a": 1}) == {"net.a": 1}
    assert prefixed("", {"a": 1}) == {"a": 1}


def test_groups_in_their_order() -> None:
    assert grouped([3, 2, 1], is_odd) == {True: [3, 1], False: [2]}
    assert by_owner({"a.weight": 1, "b.weight": 2, "a.bias": 3, "scale": 4}) == {
        "a": [1, 3],
        "b": [2],
        "": [4],
    }
    assert names_of_each(NUMBERS) == {1: ["a.one", "b.one"], 2: ["a.two"]}

"""What two models or two states must have in common."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.models import state


def assert_same_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Expect the same names, in the same order, and the same bits."""
    assert list(found) == list(expected)
    assert_holds(found, expected)


def assert_state(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Expect a model's state dict to be this one, bit for bit."""
    assert_same_tensors(state(model), expected)


def assert_same_state(model: nn.Module, other: nn.Module) -> None:
    """Expect the state dicts of two models to be the same, bit for bit."""
    assert_same_tensors(state(model), state(other))


def assert_holds(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Expect each of these tensors by its name, bit for bit; there may be others."""
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_all_equal(found: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Expect as many tensors, with the same bits in the same order."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def assert_close_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    """Expect the same names, and nearly the same values."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def assert_all_refused(
    model: nn.Module, calls: Iterable[Callable[[Any], object]], error: Any, match: str
) -> None:
    """Expect this error of each call with ``model``, which no call changes."""
    before = state(model)
    for call in calls:
        with pytest.raises(error, match=match):
            call(model)
        assert_state(model, before)


def assert_rows_are_parallel(found: Tensor, expected: Tensor) -> None:
    """Each row has the direction of the row that is expected in its place, or the opposite one."""
    cosines = torch.cosine_similarity(found.double(), expected.double(), dim=1)
    assert (cosines.abs() > 0.999).all(), cosines


def assert_all_have_moved(module: nn.Module, names: Iterable[str]) -> None:
    """No parameter of these names is zero."""
    for name in names:
        assert module.get_parameter(name).any(), name

"""Some rows of a batch, taken out of arguments and put together again."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.functional.split_batch import NoRowsError, put_together, take_rows

N = 4
EVEN = torch.tensor([2, 0])
ODD = torch.tensor([1, 3])


def batch(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_rows_are_taken_in_their_order() -> None:
    x = batch(N, 3)
    (taken,) = take_rows((x,), EVEN, N)
    assert torch.equal(taken, x[EVEN])


def test_containers_of_any_depth_keep_their_form() -> None:
    x, deep = batch(N, 3), batch(N)
    taken = take_rows({"x": x, "more": [deep, "word", 3]}, ODD, N)
    assert torch.equal(taken["x"], x[ODD])
    assert torch.equal(taken["more"][0], deep[ODD])
    assert taken["more"][1:] == ["word", 3]


def test_what_has_another_number_of_rows_stays_whole() -> None:
    other, scalar = batch(N + 1, 2), torch.tensor(1.0)
    taken = take_rows((batch(N), other, scalar), EVEN, N)
    assert taken[1] is other
    assert taken[2] is scalar


def test_states_have_their_rows_in_another_dimension() -> None:
    x, state = batch(N, 2), batch(1, N, 3)
    taken = take_rows((x, state), EVEN, N, states_dim=1)
    assert torch.equal(taken[0], x[EVEN])
    assert torch.equal(taken[1], state[:, EVEN])


def test_a_mask_of_all_rows_stays_whole_though_it_is_as_long() -> None:
    mask = batch(N, N)
    taken = take_rows((batch(N), mask), EVEN, N, mask=mask)
    assert taken[1] is mask


@pytest.mark.parametrize("states_dim", [0, 1])
def test_what_was_taken_apart_comes_together(states_dim: int) -> None:
    x = batch(N, 3)
    state = batch(N, 2) if states_dim == 0 else batch(2, N)
    values: Any = {"x": x, "state": (state, "kind")}
    parts = [take_rows(values, rows, N, states_dim) for rows in (EVEN, ODD)]
    together = put_together(parts, [EVEN, ODD], states_dim)
    assert torch.equal(together["x"], x)
    assert torch.equal(together["state"][0], state)
    assert together["state"][1] == "kind"


@pytest.mark.parametrize(
    ("one", "other"),
    [(torch.ones(()), torch.ones(())), (1.5, 2.5), (torch.ones(2), torch.ones(3))],
    ids=["a mean", "a number", "other lengths"],
)
def test_what_has_no_rows_must_be_the_same(one: Any, other: Any) -> None:
    with pytest.raises(NoRowsError) as error:
        put_together([one, other], [EVEN, ODD])
    assert str(error.value) == type(one).__name__


def test_the_same_number_in_each_part_is_that_number() -> None:
    x = batch(N)
    together = put_together([(x[EVEN], 0.5), (x[ODD], 0.5)], [EVEN, ODD])
    assert torch.equal(together[0], x)
    assert together[1] == 0.5

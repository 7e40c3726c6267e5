"""Rows with updates of their own, against each row alone."""

import pytest
import torch
from torch import Tensor

from lightning_lora import ConfigError
from lightning_lora.functional.rows import add_to_rows, put_back, stacked, taken

RANKS = (2, 0, 3)


def updates() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(r, 5).double(), torch.randn(4, r).double()) for r in RANKS]


@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 5), (3, 2, 7, 5)])
def test_each_row_gets_its_own_update(shape: tuple[int, ...]) -> None:
    x, output, pairs = torch.randn(shape).double(), torch.randn(*shape[:-1], 4).double(), updates()
    expected = torch.stack([y + row @ (b @ a).T for y, row, (a, b) in zip(output, x, pairs, strict=True)])
    torch.testing.assert_close(add_to_rows(output.clone(), x, *stacked(pairs)), expected)
    with torch.no_grad():
        made = add_to_rows(output, x, *stacked(pairs))
    torch.testing.assert_close(made, expected)
    assert made.data_ptr() == output.data_ptr()  # without gradients, no memory is needed for a sum


def test_an_update_of_zero_changes_no_bit() -> None:
    x, output = torch.randn(3, 7, 5), torch.randn(3, 7, 4)
    pairs = [(a.float(), b.float()) for a, b in updates()]
    assert torch.equal(add_to_rows(output, x, *stacked(pairs))[1], output[1])


def test_gradients_reach_the_update_of_each_row() -> None:
    x, pairs = torch.randn(3, 2, 5).double().requires_grad_(), [(a.requires_grad_(), b) for a, b in updates()]
    torch.autograd.gradcheck(lambda *each: add_to_rows(torch.ones(3, 2, 4).double(), x, *stacked(pairs)), [x])
    add_to_rows(torch.zeros(3, 2, 4).double(), x, *stacked(pairs)).sum().backward()
    for row, (a, b) in zip(x, pairs, strict=True):
        torch.testing.assert_close(a.grad, torch.outer(b.sum(0), row.detach().sum(0)))


def test_rows_come_back_where_they_were() -> None:
    tree = {"out": torch.randn(4, 2), "states": (torch.randn(2, 4), None), "kind": "x"}
    rows = [torch.tensor([2, 0]), torch.tensor([3, 1])]
    parts = [taken(tree, each, 4, later=1) for each in rows]
    assert parts[0]["states"][0].shape == (2, 2) and torch.equal(parts[0]["out"], tree["out"][[2, 0]])
    back = put_back("a", parts, rows, later=1)
    assert back["kind"] == "x" and torch.equal(back["out"], tree["out"])
    assert torch.equal(back["states"][0], tree["states"][0])


def test_what_has_no_rows_is_not_put_together() -> None:
    rows = [torch.tensor([0]), torch.tensor([1, 2])]
    with pytest.raises(ConfigError, match="'a' returns a Tensor without a row"):
        put_back("a", [torch.tensor(1.0), torch.tensor(1.0)], rows)
    with pytest.raises(ConfigError, match="'a' returns a str"):
        put_back("a", ["a", "b"], rows)


def test_a_tensor_can_be_left_whole() -> None:
    x, mask = torch.randn(3, 2), torch.ones(3, 3)
    args, kwargs = taken(((x,), {"mask": mask}), torch.tensor([1]), 3, whole=mask)
    assert torch.equal(args[0], x[1:2]) and kwargs["mask"] is mask

"""Rows with updates of their own, against each row alone."""

import pytest
import torch
from torch import Tensor

from lightning_lora import ConfigError
from lightning_lora.functional.batch_rows import add_to_rows, put_back, stacked

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


def test_what_has_no_rows_is_not_put_together() -> None:
    rows = [torch.tensor([0]), torch.tensor([1, 2])]
    with pytest.raises(ConfigError, match="'a' returns a Tensor without a row"):
        put_back("a", [torch.tensor(1.0), torch.tensor(1.0)], rows)
    with pytest.raises(ConfigError, match="'a' returns a str"):
        put_back("a", ["a", "b"], rows)

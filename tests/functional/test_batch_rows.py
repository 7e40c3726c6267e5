"""Rows of a batch with updates of their own."""

import pytest
import torch

from lightning_lora.functional.batch_rows import add_to_rows


def test_the_output_that_updates_are_added_to_keeps_its_own_gradient() -> None:
    x = torch.randn(2, 3, 4)
    a = torch.randn(2, 1, 4)
    b = torch.randn(2, 5, 1)
    start = torch.randn(2, 3, 5, requires_grad=True)
    output = start.exp()  # whose gradient is the output itself
    values = output.detach().clone()
    sums = add_to_rows(output, x, a, b)
    (gradient,) = torch.autograd.grad(sums.sum(), start)
    assert torch.equal(output, values)
    assert torch.equal(gradient, values)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("of_x", "of_output"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_the_rows_may_have_another_dtype_than_the_output(
    of_x: torch.dtype, of_output: torch.dtype, grad: bool, autocast: bool
) -> None:
    x = torch.randn(2, 3, 4).to(of_x)
    a = torch.randn(2, 1, 4)
    b = torch.randn(2, 5, 1)
    output = torch.randn(2, 3, 5).to(of_output)
    expected = output + x.float() @ a.mT @ b.mT
    with (
        torch.set_grad_enabled(grad),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        sums = add_to_rows(output, x, a, b)
    assert sums.dtype == of_output
    torch.testing.assert_close(sums.float(), expected, rtol=0.1, atol=0.1)

"""Rows of a batch with updates of their own."""

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

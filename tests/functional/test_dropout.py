"""Dropped positions follow from the seed, at the asked rate."""

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_lora.functional.dropout import drops
from lightning_lora.functional.linear import adapted_linear
from tests.support.functional import inputs


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9, 0.999])
def test_each_element_is_dropped_by_itself_at_the_asked_rate(p: float) -> None:
    ones = torch.ones(2_000, 500)
    for block, drop in drops(ones, p, seed=3):
        drop(ones[block])
    dropped = ones == 0
    deviation = (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(dropped.double().mean() - p) < 4 * deviation
    for place in (0, 1, 499):  # whatever the column, the first and the last of a block too
        assert abs(dropped[:, place].double().mean() - p) < 5 * (p * (1 - p) / 2_000) ** 0.5
    flat = dropped.flatten().double() - p
    for lag in (1, 2, 3, 499, 500, 1000):  # and whatever its neighbours do
        covariance = (flat[:-lag] * flat[lag:]).mean()
        assert abs(covariance) < 5 * p * (1 - p) / flat.numel() ** 0.5


def test_what_is_dropped_follows_from_the_seed_and_differs_from_call_to_call() -> None:
    x, weight, _, a, b = inputs(64, 32, out=8)

    def update() -> Tensor:
        return adapted_linear(x, weight * 0, None, a, b, 1.0, 0.5)

    torch.manual_seed(0)
    first, second = update(), update()
    torch.manual_seed(0)
    assert torch.equal(update(), first) and torch.equal(update(), second) and not torch.equal(first, second)
    torch.manual_seed(1)
    assert not torch.equal(update(), first)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_regions_drop_the_same(use_reentrant: bool) -> None:
    x, *others = inputs(8, 16, 32, out=32, dtype=torch.float32)
    gradients = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        torch.manual_seed(0)
        run(lambda x: adapted_linear(x, *others, 1.0, 0.5).tanh(), x).sum().backward()
        gradients.append([t.grad for t in (x, *others)])
        for t in (x, *others):
            t.grad = None
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_defaults_of_device_and_dtype_do_not_reach_dropout() -> None:
    tensors = inputs(4, 8, dtype=torch.float32)
    torch.manual_seed(0)
    expected = adapted_linear(*tensors, 1.0, 0.5)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        with torch.device("meta"):
            found = adapted_linear(*tensors, 1.0, 0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)

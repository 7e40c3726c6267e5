"""The gradients written out are those that torch derives; dropped positions follow from the seed."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora.functional import adapted_linear as linear
from lightning_lora.functional.adapted_linear import adapted_linear
from lightning_lora.functional.dropout import drops
from tests.benchmarks.measure import saved_bytes
from tests.support.models import as_trained


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)


def inputs(*shape: int, out: int = 5, r: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sizes = (shape, (out, shape[-1]), (out,), (r, shape[-1]), (out, r))
    return [torch.randn(size, dtype=dtype, requires_grad=True) for size in sizes]


def goes_by_hand(output: Tensor) -> bool:
    return type(output.grad_fn).__name__ == "_AdaptedLinearBackward"


LAYOUTS = ("contiguous", "transposed", "sliced", "expanded", "every second")


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Tensors like ``x`` in ways that memory may hold them."""
    return {
        "contiguous": x,
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
        "sliced": torch.cat([x, x], -1)[..., : x.shape[-1]],
        "expanded": x[:1].expand(x.shape) if x.dim() > 1 else x,
        "every second": torch.stack([x, x], 0).movedim(0, -1).flatten(-2)[..., ::2],
    }


def laid_out(layout: str, out: int) -> list[Tensor]:
    """Tensors of an adapted layer, with an input that lies in memory in this way."""
    x, *others = inputs(2, 3, 4, out=out)
    return [layouts(x.detach())[layout].requires_grad_(), *others]


@pytest.mark.parametrize(("layout", "dropout"), [("transposed", 0.0), ("every second", 0.4)])
def test_gradients_pass_torchs_check_to_the_second_order(layout: str, dropout: float) -> None:
    tensors = laid_out(layout, out=3)

    def compute(*args: Any) -> Tensor:
        torch.manual_seed(1)
        return adapted_linear(*args, 0.7, dropout)

    assert torch.autograd.gradcheck(compute, tensors)
    assert torch.autograd.gradgradcheck(compute, tensors)


def test_gradients_with_gradients_drop_what_those_without_drop() -> None:
    tensors = laid_out("expanded", out=4)
    output = adapted_linear(*tensors, 1.0, 0.4).square().sum()
    first = torch.autograd.grad(output, tensors, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, tensors, create_graph=True), first)


NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


@given(
    shape=st.lists(st.integers(0, 4), max_size=4).flatmap(lambda s: st.tuples(*map(st.just, s), st.integers(1, 6))),
    out=st.integers(1, 6),
    r=st.integers(1, 4),
    scaling=st.floats(-3, 3, width=16),
    layout=st.sampled_from(LAYOUTS),
    trained=st.sets(st.sampled_from(NAMES), min_size=1),
    with_bias=st.booleans(),
)
@settings(max_examples=60)
def test_gradients_are_those_of_the_composition(
    shape: tuple[int, ...],
    out: int,
    r: int,
    scaling: float,
    layout: str,
    trained: set[str],
    with_bias: bool,
) -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs(*shape, out=out, r=r))
    x = layouts(x)[layout]
    tensors = dict(zip(NAMES, (x, weight, bias, a, b), strict=True))
    if not with_bias:
        del tensors["bias"]
    for name in trained & tensors.keys():
        tensors[name].requires_grad_()
    call = {"bias": None, **tensors}
    ours = adapted_linear(**call, scaling=scaling)
    theirs = composed(*(call[name] for name in NAMES), scaling)
    torch.testing.assert_close(ours, theirs)
    wanted = [t for t in tensors.values() if t.requires_grad]
    if not wanted:
        return
    assert goes_by_hand(ours)
    for grad in layouts(torch.randn_like(ours)).values():
        got = torch.autograd.grad(ours, wanted, grad, retain_graph=True)
        for one, other in zip(got, torch.autograd.grad(theirs, wanted, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(one, other)


# The rule that chooses between W x + B A x and (W + B A) x


@pytest.mark.parametrize(
    ("tokens", "dtype", "precision", "dropout", "is_updated"),
    [
        (5, torch.float64, "medium", 0.0, True),
        (5, torch.float32, "highest", 0.0, True),
        (4, torch.float32, "highest", 0.0, False),
        (5, torch.float32, "highest", 0.1, False),
        (5, torch.float32, "high", 0.0, False),
        (5, torch.bfloat16, "highest", 0.0, False),
    ],
)
def test_weights_are_updated_for_many_tokens_where_no_small_update_is_lost(
    tokens: int,
    dtype: Any,
    precision: str,
    dropout: float,
    is_updated: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = []
    monkeypatch.setattr(linear, "_updated", lambda w, a, b, s: made.append(w) or w + s * b @ a)  # type: ignore[func-returns-value]
    x, weight, bias, a, b = inputs(tokens, 2, out=3, r=1, dtype=dtype)  # 4.8 tokens are twice the mean of 2 and 3
    torch.set_float32_matmul_precision(precision)
    try:
        adapted_linear(x, weight, bias, a, b, 1.0, dropout)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert bool(made) is is_updated


def test_a_fresh_update_changes_nothing_whatever_the_form_and_the_layout() -> None:
    torch.manual_seed(0)
    for tokens, reads, writes in itertools.product((3, 400), (4, 19, 34), (4, 18, 39)):
        x, weight, bias, a, b = inputs(tokens, reads, out=writes)
        bias = bias.detach()
        every_second = torch.randn(writes, 2 * reads, dtype=weight.dtype)[:, ::2]
        for laid_out in (weight.detach(), weight.detach().T.contiguous().T, every_second):
            assert torch.equal(
                adapted_linear(x, laid_out, bias, a, b * 0, 1.0),
                F.linear(x, laid_out, bias),
            )


@pytest.mark.parametrize(
    ("dtype", "adapters", "dropout"),
    [
        (torch.bfloat16, torch.float32, 0.0),
        (torch.bfloat16, None, 0.3),
        (torch.float16, torch.float32, 0.3),
    ],
)
def test_gradients_are_as_exact_as_the_dtype_allows(dtype: torch.dtype, adapters: Any, dropout: float) -> None:
    torch.manual_seed(0)
    wide = inputs(3, 17, 32, out=24, r=4)
    narrow = [t.detach().to(adapters or dtype if i > 2 else dtype).requires_grad_() for i, t in enumerate(wide)]
    grad = torch.randn(3, 17, 24, dtype=torch.float64)
    outputs = []
    for tensors in (wide, narrow):
        torch.manual_seed(5)
        output = adapted_linear(*tensors, 2.0, dropout)
        output.backward(grad.to(output.dtype))
        outputs.append(output)
    assert outputs[1].dtype is dtype
    eps = torch.finfo(dtype).eps
    for exact, rounded in [
        (outputs[0], outputs[1]),
        *((w.grad, n.grad) for w, n in zip(wide, narrow, strict=True)),
    ]:
        assert (exact - rounded).norm() < 4 * eps * exact.norm()
    assert [n.grad.dtype for n in narrow] == [n.dtype for n in narrow]


@pytest.mark.parametrize(
    ("dtype", "dropout"),
    [(torch.bfloat16, 0.0), (torch.float16, 0.0), (torch.float16, 0.05)],
)
def test_scaling_is_exact_and_keeps_half_precision_within_its_range(dtype: torch.dtype, dropout: float) -> None:
    torch.manual_seed(0)
    x, weight, _, a, b = (t.detach() for t in inputs(256, 64))
    rounded = [t.to(dtype).requires_grad_() for t in (x, weight * 0, a * 20, b * 200)]
    exact = [t.detach().double().requires_grad_() for t in rounded]
    grad = 32 * torch.randn(256, 5)
    scaling = 1.004e-3  # float16 cannot hold g A, and can s g A; bfloat16 not s
    for x, weight, a, b in (exact, rounded):
        torch.manual_seed(5)
        adapted_linear(x, weight, None, a, b, scaling, dropout).backward(grad.to(x.dtype))
    for wide, narrow in zip(exact, rounded, strict=True):
        size = (narrow.grad.double() * wide.grad).sum() / wide.grad.square().sum()
        assert abs(size - 1) < torch.finfo(dtype).eps / narrow.numel() ** 0.2  # of many values, errors even out


# Memory


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.1), (torch.bfloat16, 0.0)])
def test_little_is_kept_for_the_backward_pass_beside_the_input(dropout: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(768, 768)).to(dtype)
    x = torch.randn(256, 768, dtype=dtype, requires_grad=True)
    as_trained(model, r=8, dropout=dropout)
    assert goes_by_hand(model(x))
    assert saved_bytes(model, x) <= 0.02 * x.nbytes


# What leaves arguments and inputs as they are


def test_a_few_tokens_are_not_rounded_to_narrower_adapters() -> None:
    x, weight, bias, a, b = (t.detach() for t in inputs(2, 64, out=32, r=4))
    for factors in ((a.bfloat16(), b.bfloat16()), (a, b.bfloat16()), (a.bfloat16(), b)):
        with torch.no_grad():
            found = adapted_linear(x, weight, bias, *factors, 1.0)
        torch.testing.assert_close(found, composed(x, weight, bias, *(t.double() for t in factors), 1.0))


@pytest.mark.parametrize(("shape", "dropout"), [((6,), 0.0), ((2, 3, 6), 0.4), ((2, 400, 6), 0.0)])
def test_an_activation_may_change_the_output_in_place(shape: tuple[int, ...], dropout: float) -> None:
    tensors = inputs(*shape, out=5)
    gradients = []
    for activation in (F.relu, F.relu_):
        torch.manual_seed(0)
        output = activation(adapted_linear(*tensors, 1.0, dropout))
        gradients.append([output, *torch.autograd.grad(output.square().sum(), tensors)])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


# Dropped positions follow from the seed, at the asked rate


@pytest.mark.parametrize("p", [0.001, 0.1, 0.999])
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

"""The gradients written out are those that torch derives; dropped positions follow from the seed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


def composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)


def inputs(
    *shape: int, out: int = 5, r: int = 2, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """An input, and the weight, bias, lora_A and lora_B of a layer that reads it; all need gradients."""
    reads = shape[-1]
    sizes = (shape, (out, reads), (out,), (r, reads), (out, r))
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


@pytest.mark.parametrize(
    ("layout", "dropout"), [("transposed", 0.0), ("every second", 0.4)]
)
def test_gradients_pass_torchs_check_to_the_second_order(
    layout: str, dropout: float
) -> None:
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
    torch.testing.assert_close(
        torch.autograd.grad(output, tensors, create_graph=True), first
    )


def test_second_derivatives_of_a_layer_that_runs_twice_count_each_path_once() -> None:
    x, *layer = inputs(3, 4, out=4)
    gradients = []
    for compute in (adapted_linear, composed):
        output = compute(compute(x, *layer, 0.7), *layer, 0.7).square().sum()
        first = torch.autograd.grad(output, layer, create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first)
        gradients.append((first, torch.autograd.grad(penalty, layer)))
    torch.testing.assert_close(gradients[0], gradients[1])


NAMES = ("x", "weight", "bias", "lora_A", "lora_B")


def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]


def as_leaves(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in this dtype, which need gradients."""
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def assert_same_gradients(
    ours: Tensor, theirs: Tensor, of: Sequence[Tensor], grad: Tensor | None = None
) -> None:
    """Expect both outputs to have these gradients, nearly."""
    found = torch.autograd.grad(ours, of, grad, retain_graph=True)
    expected = torch.autograd.grad(theirs, of, grad, retain_graph=True)
    torch.testing.assert_close(found, expected)


SHAPES = st.tuples(st.lists(st.integers(0, 4), max_size=4), st.integers(1, 6))


@given(
    shape=SHAPES,
    out=st.integers(1, 6),
    r=st.integers(1, 4),
    scaling=st.floats(-3, 3, width=16),
    layout=st.sampled_from(LAYOUTS),
    trained=st.sets(st.sampled_from(NAMES), min_size=1),
    with_bias=st.booleans(),
)
@settings(max_examples=60)
def test_gradients_are_those_of_the_composition(
    shape: tuple[list[int], int],
    out: int,
    r: int,
    scaling: float,
    layout: str,
    trained: set[str],
    with_bias: bool,
) -> None:
    batch, reads = shape
    x, *others = detached(inputs(*batch, reads, out=out, r=r))
    tensors: dict[str, Any] = dict(
        zip(NAMES, [layouts(x)[layout], *others], strict=True)
    )
    if not with_bias:
        tensors["bias"] = None
        trained = trained - {"bias"}
    wanted = [tensors[name].requires_grad_() for name in trained]
    ours = adapted_linear(*tensors.values(), scaling)
    theirs = composed(*tensors.values(), scaling)
    torch.testing.assert_close(ours, theirs)
    if not wanted:
        return
    assert goes_by_hand(ours)
    for grad in layouts(torch.randn_like(ours)).values():
        assert_same_gradients(ours, theirs, wanted, grad)


# The rule that chooses between W x + B A x and (W + B A) x


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


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

    def updated(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        made.append(weight)
        return weight + scaling * b @ a

    monkeypatch.setattr(linear, "_updated", updated)
    # 4.8 tokens are twice the mean of 2 and 3
    tensors = inputs(tokens, 2, out=3, r=1, dtype=dtype)
    with matmul_precision(precision):
        adapted_linear(*tensors, 1.0, dropout)
    assert bool(made) is is_updated


def weight_layouts(weight: Tensor) -> list[Tensor]:
    """A weight as it is, transposed in memory, and one that is every second column of another."""
    wider = torch.randn(len(weight), 2 * weight.shape[1], dtype=weight.dtype)
    return [weight, weight.T.contiguous().T, wider[:, ::2]]


@pytest.mark.parametrize("writes", [4, 18, 39])
@pytest.mark.parametrize("reads", [4, 19, 34])
@pytest.mark.parametrize("tokens", [3, 400])
def test_a_fresh_update_changes_nothing_whatever_the_form_and_the_layout(
    tokens: int, reads: int, writes: int
) -> None:
    torch.manual_seed(0)
    x, weight, bias, a, _ = inputs(tokens, reads, out=writes)
    fresh = torch.zeros(writes, 2, dtype=x.dtype, requires_grad=True)
    bias = bias.detach()
    for laid_out in weight_layouts(weight.detach()):
        output = adapted_linear(x, laid_out, bias, a, fresh, 1.0)
        assert torch.equal(output, F.linear(x, laid_out, bias))


def assert_as_exact(rounded: Tensor, exact: Tensor, eps: float) -> None:
    assert (exact - rounded).norm() < 4 * eps * exact.norm()


def with_gradients(tensors: list[Tensor], dropout: float, grad: Tensor) -> Tensor:
    """The output, after a backward pass from it."""
    torch.manual_seed(5)
    output = adapted_linear(*tensors, 2.0, dropout)
    output.backward(grad.to(output.dtype))
    return output


@pytest.mark.parametrize(
    ("dtype", "adapters", "dropout"),
    [
        (torch.bfloat16, torch.float32, 0.0),
        (torch.bfloat16, torch.bfloat16, 0.3),
        (torch.float16, torch.float32, 0.3),
    ],
)
def test_gradients_are_as_exact_as_the_dtype_allows(
    dtype: torch.dtype, adapters: Any, dropout: float
) -> None:
    torch.manual_seed(0)
    wide = inputs(3, 17, 32, out=24, r=4)
    narrow = as_leaves(wide[:3], dtype) + as_leaves(wide[3:], adapters)
    grad = torch.randn(3, 17, 24, dtype=torch.float64)
    exact = with_gradients(wide, dropout, grad)
    output = with_gradients(narrow, dropout, grad)
    assert output.dtype is dtype
    eps = torch.finfo(dtype).eps
    assert_as_exact(output, exact, eps)
    for one, other in zip(narrow, wide, strict=True):
        assert_as_exact(one.grad, other.grad, eps)
        assert one.grad.dtype == one.dtype


@pytest.mark.parametrize(
    ("dtype", "dropout"),
    [(torch.bfloat16, 0.0), (torch.float16, 0.0), (torch.float16, 0.05)],
)
def test_scaling_is_exact_and_keeps_half_precision_within_its_range(
    dtype: torch.dtype, dropout: float
) -> None:
    torch.manual_seed(0)
    x, weight, _, a, b = detached(inputs(256, 64))
    rounded = as_leaves([x, weight * 0, a * 20, b * 200], dtype)
    exact = as_leaves(rounded, torch.float64)
    grad = 32 * torch.randn(256, 5)
    scaling = 1.004e-3  # float16 cannot hold g A, and can s g A; bfloat16 not s
    for x, weight, a, b in (exact, rounded):
        torch.manual_seed(5)
        output = adapted_linear(x, weight, None, a, b, scaling, dropout)
        output.backward(grad.to(x.dtype))
    for wide, narrow in zip(exact, rounded, strict=True):
        size = (narrow.grad.double() * wide.grad).sum() / wide.grad.square().sum()
        # of many values, errors even out
        bound = torch.finfo(dtype).eps / narrow.numel() ** 0.2
        assert abs(size - 1) < bound


# Memory


@pytest.mark.parametrize(
    ("dtype", "dropout"), [(torch.float32, 0.1), (torch.bfloat16, 0.0)]
)
def test_little_is_kept_for_the_backward_pass_beside_the_input(
    dropout: float, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(768, 768)).to(dtype)
    x = torch.randn(256, 768, dtype=dtype, requires_grad=True)
    as_trained(model, r=8, dropout=dropout)
    assert goes_by_hand(model(x))
    assert saved_bytes(model, x) <= 0.02 * x.nbytes


# What leaves arguments and inputs as they are


@pytest.mark.parametrize("narrow_a", [True, False])
@pytest.mark.parametrize("narrow_b", [True, False])
@torch.no_grad()
def test_a_few_tokens_are_not_rounded_to_narrower_adapters(
    narrow_a: bool, narrow_b: bool
) -> None:
    x, weight, bias, a, b = detached(inputs(2, 64, out=32, r=4))
    if narrow_a:
        a = a.bfloat16()
    if narrow_b:
        b = b.bfloat16()
    found = adapted_linear(x, weight, bias, a, b, 1.0)
    expected = composed(x, weight, bias, a.double(), b.double(), 1.0)
    torch.testing.assert_close(found, expected)


def with_activation(
    activation: Callable[[Tensor], Tensor], tensors: list[Tensor], dropout: float
) -> list[Tensor]:
    """The output of a layer with this activation, and the gradients."""
    torch.manual_seed(0)
    output = activation(adapted_linear(*tensors, 1.0, dropout))
    loss = output.square().sum()
    return [output, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize(
    ("shape", "dropout"), [((6,), 0.0), ((2, 3, 6), 0.4), ((2, 400, 6), 0.0)]
)
def test_an_activation_may_change_the_output_in_place(
    shape: tuple[int, ...], dropout: float
) -> None:
    tensors = inputs(*shape, out=5)
    expected = with_activation(F.relu, tensors, dropout)
    found = with_activation(F.relu_, tensors, dropout)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Dropped positions follow from the seed, at the asked rate


def deviation(rate: float, number: int) -> float:
    """The standard deviation of the share of what is dropped, among so many elements."""
    return (rate * (1 - rate) / number) ** 0.5


@pytest.mark.parametrize("p", [0.001, 0.1, 0.999])
def test_each_element_is_dropped_by_itself_at_the_asked_rate(p: float) -> None:
    ones = torch.ones(2_000, 500)
    for block, drop in drops(ones, p, seed=3):
        drop(ones[block])
    dropped = (ones == 0).double()
    number = dropped.numel()
    assert abs(dropped.mean() - p) < 4 * deviation(p, number)
    # whatever the column, the first and the last of a block too
    for place in (0, 1, 499):
        assert abs(dropped[:, place].mean() - p) < 5 * deviation(p, 2_000)
    flat = dropped.flatten() - p
    for lag in (1, 2, 3, 499, 500, 1000):  # and whatever its neighbours do
        covariance = (flat[:-lag] * flat[lag:]).mean()
        assert abs(covariance) < 5 * p * (1 - p) / number**0.5


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


def test_no_gradient_is_computed_that_nobody_asks_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight, _, a, b = inputs(8, 6, out=5)
    x.requires_grad_(False)
    weight.requires_grad_(False)
    computed = []
    gradients = linear._AdaptedLinear.gradients

    def note(*args: Any) -> Any:
        found = gradients(*args)
        computed.append(found)
        return found

    monkeypatch.setattr(linear._AdaptedLinear, "gradients", note)
    adapted_linear(x, weight, None, a, b, 0.5).sum().backward()
    ((for_x, for_weight, _, *for_factors),) = computed
    assert for_x is None
    assert for_weight is None
    assert for_factors[0] is not None

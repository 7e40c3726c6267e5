"""Where the composition of torch's functions is taken instead."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.functional.adapted_linear import adapted_linear
from tests.functional.test_linear import (
    assert_same_gradients,
    composed,
    detached,
    goes_by_hand,
    inputs,
)
from tests.support.models import randomise

Compute = Callable[..., Tensor]


def derived(function: Compute) -> dict[str, Tensor]:
    """What torch's transforms and its forward mode derive of a layer that computes with this function."""
    torch.manual_seed(0)
    x, weight, bias, a, b = detached(inputs(3, 4, 6, out=5))

    def layer(x: Tensor, a: Tensor) -> Tensor:
        return function(x, weight, bias, a, b, 0.5)

    def norm(a: Tensor, x: Tensor) -> Tensor:
        return layer(x, a).norm()

    def of_a(a: Tensor) -> Tensor:
        return layer(x, a)

    def loss(a: Tensor) -> Tensor:
        return layer(x, a).square().sum()

    ones = torch.ones_like(a)
    per_sample = torch.func.vmap(torch.func.grad(norm), in_dims=(None, 0))
    return {
        "per sample": per_sample(a, x),
        "jvp": torch.func.jvp(of_a, (a,), (ones,))[1],
        "hessian": torch.func.hessian(loss)(a),
        "batch": batch_of_gradients(layer, x, a),
        "forward": forward_mode(of_a, a, ones),
    }


def batch_of_gradients(layer: Compute, x: Tensor, a: Tensor) -> Tensor:
    tracked = [x.clone().requires_grad_(), a.clone().requires_grad_()]
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(7, 3, 4, 5, dtype=x.dtype, generator=generator)
    of_x, of_a = torch.autograd.grad(
        layer(*tracked), tracked, batch, is_grads_batched=True
    )
    return torch.cat([of_x.flatten(), of_a.flatten()])


def forward_mode(compute: Compute, a: Tensor, tangent: Tensor) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(a, tangent)
        return torch.autograd.forward_ad.unpack_dual(compute(dual)).tangent


# which torch's own rules for second derivatives use
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_functional_transforms_and_forward_mode_derive_the_same() -> None:
    torch.testing.assert_close(derived(adapted_linear), derived(composed))


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double() for tensor in tensors]


def test_autocast_computes_in_its_dtype_by_hand() -> None:
    tensors = inputs(4, 8, 16, out=16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapted_linear(*tensors, 1.0)
        exact = composed(*doubled(tensors), 1.0)  # which autocast leaves alone
    assert output.dtype is torch.bfloat16
    assert goes_by_hand(output)
    assert (output - exact).norm() < 0.02 * exact.norm()
    output.sum().backward()
    for tensor in tensors:
        assert tensor.grad.dtype is torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted_linear(*doubled(tensors), 1.0).dtype is torch.float64


def traced_layer(tokens: int, differentiates: bool) -> tuple[Any, list[Tensor]]:
    """An adapted layer, traced with so many tokens, and its tensors."""
    model = nn.Sequential(nn.Linear(8, 5, dtype=torch.float64))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    layer: Any = model[0]
    x = torch.randn(tokens, 8).double()
    with torch.set_grad_enabled(differentiates):
        # and compared with a trace without gradients
        traced = torch.jit.trace(model, x)
    return traced, [layer.weight, layer.bias, layer.lora_A, layer.lora_B]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize(("tokens", "differentiates"), [(1, False), (40, True)])
@pytest.mark.parametrize("rows", [1, 3, 400])
def test_a_traced_layer_computes_any_number_of_tokens(
    tokens: int, differentiates: bool, rows: int
) -> None:
    traced, tensors = traced_layer(tokens, differentiates)
    _, _, a, b = tensors
    x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    output = traced(x)
    expected = composed(x, *tensors, 4.0)
    torch.testing.assert_close(output, expected)
    assert_same_gradients(output.square().sum(), expected.square().sum(), [x, a, b])


class Other(Tensor):
    """A tensor of another class."""


def test_tensors_without_values_or_of_other_classes_are_composed() -> None:
    x, *others = inputs(3, 6, dtype=torch.float32)
    output = adapted_linear(x.as_subclass(Other), *others, 1.0)
    assert not goes_by_hand(output)
    meta = [tensor.to("meta") for tensor in (x, *others)]
    assert adapted_linear(*meta, 1.0, 0.1).shape == (3, 5)
    rows = torch.ones(3, 6)
    nested = torch.nested.nested_tensor([torch.ones(2, 6), rows])
    with torch.no_grad():
        output = adapted_linear(nested, *others, 1.0)
    torch.testing.assert_close(output.unbind()[1], composed(rows, *others, 1.0))


SAVED = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]


def checkpointed(function: Compute, x: Tensor, *others: Tensor) -> Tensor:
    """What the function computes, checkpointed but for its products."""

    def compute(x: Tensor) -> Tensor:
        return function(x, *others, 1.0)

    create_contexts = torch.utils.checkpoint.create_selective_checkpoint_contexts
    save = partial(create_contexts, SAVED)
    return checkpoint(compute, x, use_reentrant=False, context_fn=save)


@pytest.mark.parametrize("tokens", [4, 400])
def test_selective_checkpointing_keeps_what_it_is_told_to(tokens: int) -> None:
    tensors = inputs(tokens, 8, out=8)
    x, _, _, a, b = tensors
    ours = checkpointed(adapted_linear, *tensors)
    theirs = checkpointed(composed, *tensors)
    found = torch.autograd.grad(ours.square().sum(), [x, a, b])
    expected = torch.autograd.grad(theirs.square().sum(), [x, a, b])
    torch.testing.assert_close(found, expected)


def test_backward_may_run_under_an_autocast_that_forward_did_not() -> None:
    tensors = inputs(4, 6, dtype=torch.float32)
    grad = torch.randn(4, 5)
    output = adapted_linear(*tensors, 1.0, 0.2)
    expected = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, tensors, grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

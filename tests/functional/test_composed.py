"""Where the composition of torch's functions is taken instead."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.tensor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.functional.adapted_linear import adapted_linear
from tests.functional.test_linear import composed, goes_by_hand, inputs
from tests.support.models import randomise


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # which torch's own rules for second derivatives use
def test_functional_transforms_and_forward_mode_derive_the_same() -> None:
    torch.manual_seed(0)
    x, weight, bias, a, b = (t.detach() for t in inputs(3, 4, 6, out=5))

    def compute(f: Callable[..., Tensor]) -> dict[str, Tensor]:
        def layer(x: Tensor, a: Tensor) -> Tensor:
            return f(x, weight, bias, a, b, 0.5)

        made = {
            "per sample": torch.func.vmap(torch.func.grad(lambda a, x: layer(x, a).norm()), in_dims=(None, 0))(a, x),
            "jvp": torch.func.jvp(lambda a: layer(x, a), (a,), (torch.ones_like(a),))[1],
            "hessian": torch.func.hessian(lambda a: layer(x, a).square().sum())(a),
        }
        tracked = [x.clone().requires_grad_(), a.clone().requires_grad_()]
        batch = torch.randn(7, 3, 4, 5, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        made["batch"] = torch.cat(
            [grad.flatten() for grad in torch.autograd.grad(layer(*tracked), tracked, batch, is_grads_batched=True)]
        )
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(a, torch.ones_like(a))
            made["forward"] = torch.autograd.forward_ad.unpack_dual(layer(x, dual)).tangent
        return made

    ours = compute(adapted_linear)
    theirs = compute(composed)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], msg=name)


def test_autocast_computes_in_its_dtype_by_hand() -> None:
    tensors = inputs(4, 8, 16, out=16, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = adapted_linear(*tensors, 1.0)
        exact = composed(*(t.detach().double() for t in tensors), 1.0)  # which autocast leaves alone
    assert output.dtype is torch.bfloat16
    assert goes_by_hand(output)
    assert (output - exact).norm() < 0.02 * exact.norm()
    output.sum().backward()
    assert all(t.grad.dtype is torch.float32 for t in tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapted_linear(*(t.double() for t in tensors), 1.0).dtype is torch.float64


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize(("tokens", "differentiates"), [(1, False), (40, True)])
def test_a_traced_layer_computes_any_number_of_tokens(tokens: int, differentiates: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 5, dtype=torch.float64))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    _, _, a, b = tensors = [
        model[0].weight,
        model[0].bias,
        model[0].lora_A,
        model[0].lora_B,
    ]
    with torch.set_grad_enabled(differentiates):
        traced = torch.jit.trace(model, torch.randn(tokens, 8).double())  # and compared with a trace without gradients
    for rows in (1, 3, 400):
        x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
        outputs = traced(x), composed(x, *tensors, 4.0)
        torch.testing.assert_close(*outputs)
        found, wanted = (torch.autograd.grad(y.square().sum(), [x, a, b]) for y in outputs)
        torch.testing.assert_close(found, wanted)


def test_tensors_without_values_or_of_other_classes_are_composed() -> None:
    class Other(Tensor):
        pass

    x, weight, bias, a, b = inputs(3, 6, dtype=torch.float32)
    assert not goes_by_hand(adapted_linear(x.as_subclass(Other), weight, bias, a, b, 1.0))
    meta = [t.to("meta") for t in (x, weight, bias, a, b)]
    assert adapted_linear(*meta, 1.0, 0.1).shape == (3, 5)
    nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)])
    with torch.no_grad():
        output = adapted_linear(nested, weight, bias, a, b, 1.0)
    torch.testing.assert_close(output.unbind()[1], composed(torch.ones(3, 6), weight, bias, a, b, 1.0))


@pytest.mark.parametrize("tokens", [4, 400])
def test_selective_checkpointing_keeps_what_it_is_told_to(tokens: int) -> None:
    x, weight, bias, a, b = inputs(tokens, 8, out=8)
    create_contexts = torch.utils.checkpoint.create_selective_checkpoint_contexts
    save = partial(create_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default])
    outputs = [
        checkpoint(
            lambda x, f=f: f(x, weight, bias, a, b, 1.0),
            x,
            use_reentrant=False,
            context_fn=save,
        )
        for f in (adapted_linear, composed)
    ]
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), [x, a, b]) for y in outputs), strict=True):
        torch.testing.assert_close(one, other)


def test_backward_may_run_under_an_autocast_that_forward_did_not() -> None:
    tensors = inputs(4, 6, dtype=torch.float32)
    grad = torch.randn(4, 5)
    output = adapted_linear(*tensors, 1.0, 0.2)
    expected = torch.autograd.grad(output, tensors, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(output, tensors, grad)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)

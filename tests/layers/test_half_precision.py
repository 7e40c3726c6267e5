"""Adapters are float32 over a base in half precision."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_lora import AdapterMismatchError, LoRAConfig, adapter_state_dict, inject_adapters, merge_adapters
from tests.support.cases import Three, three
from tests.support.layers import LAYERS, Model, config
from tests.support.models import WIDTH, X, randomise, same

KINDS = [name for name in LAYERS if name not in ("packed lstm", "lstm with projections")]


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("name", KINDS)
def test_it_computes_in_the_bases_dtype_nearly_what_float32_does_and_trains_in_float32(name: str) -> None:
    build, x = LAYERS[name]
    model, x = Model(build()).bfloat16(), tree_map(lambda t: t.bfloat16() if is_float(t) else t, x)
    inject_adapters(model, config(model))
    randomise(model, scale=0.5)
    exact = copy.deepcopy(model).float()
    output, expected = model(x), exact(tree_map(lambda t: t.float() if is_float(t) else t, x))
    assert output.dtype is torch.bfloat16
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    output.float().square().sum().backward()
    expected.square().sum().backward()
    gradients = dict(exact.named_parameters())
    for factor in adapter_state_dict(model):
        p, q = model.get_parameter(factor), gradients[factor]
        assert p.dtype is torch.float32
        assert p.grad is not None and q.grad is not None
        assert p.grad.dtype is torch.float32 and (p.grad - q.grad).norm() < 0.05 * q.grad.norm() + 1e-3


# What adapters are kept in


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("first", ["convert", "inject"])
def test_adapters_are_kept_in_float32_over_a_half_precision_base(dtype: torch.dtype, first: str) -> None:
    model = three() if first == "inject" else Three().to(dtype)
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()} if first == "inject" else {}
    if first == "inject":
        model.linear(torch.ones(WIDTH)).sum().backward()
        model.to(dtype)
        assert same(adapter_state_dict(model), before)
        assert model.linear.lora_A.grad.dtype == torch.float32
    else:
        inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    assert model.linear.weight.dtype == dtype
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(X).dtype == dtype
    assert model.double().linear.lora_A.dtype == torch.float64 and model.to(dtype).linear.lora_A.dtype == torch.float32


def test_adapters_are_kept_as_the_base_if_asked() -> None:
    made = Three().bfloat16()
    inject_adapters(made, LoRAConfig(r=2, target_modules="all", autocast_adapter_dtype=False))
    model = three(autocast_adapter_dtype=False).bfloat16()
    assert {p.dtype for p in (*made.parameters(), *model.parameters())} == {torch.bfloat16}
    with pytest.raises(AdapterMismatchError, match=r"dtype=False; this configuration asks for .*dtype=True"):
        inject_adapters(model, LoRAConfig(r=2, target_modules="all"))


def test_meta_adapters_become_real_in_float32() -> None:
    with torch.device("meta"):
        model = Three()
    inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    model.bfloat16().to_empty(device="cpu")
    assert model.linear.lora_A.dtype == torch.float32 and model.linear.weight.dtype == torch.bfloat16


# Right numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("merged", [False, True])
def test_outputs_and_gradients_are_those_of_float64(dtype: torch.dtype, keep: bool, merged: bool) -> None:
    model = three(autocast_adapter_dtype=keep).to(dtype)
    exact = three().double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    if merged:
        merge_adapters(model)
    near = {"rtol": 16 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    output, expected = model(X), exact(X)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, **near)
    if not merged:
        output.square().mean().backward()
        expected.square().mean().backward()
        for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad.double(), q.grad, **near, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("merged", [False, True])
def test_autocast_computes_what_the_base_computes_it_in(merged: bool) -> None:
    model, exact = three(), three().double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    base = Three()
    if merged:
        merge_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        output, dtype = model(X), base(X).dtype
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact(X), rtol=0.1, atol=0.1)

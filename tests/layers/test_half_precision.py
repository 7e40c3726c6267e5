"""Adapters are float32 over a base in half precision."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import AdapterMismatchError, LoRAConfig, adapter_state_dict, inject_adapters, merge_adapters
from tests.support.cases import Three, three
from tests.support.models import WIDTH, WORDS, randomise, same

FLOATS = torch.linspace(-1, 1, 30).reshape(2, 3, 5)
PLANE = torch.linspace(-1, 1, 200).view(2, 4, 5, 5)
INDEX = torch.tensor([[0, 3, 1], [4, 4, 2]])
KINDS: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
    "linear": (lambda: nn.Linear(5, 4), (FLOATS,)),
    "conv1d": (lambda: Conv1D(4, 5), (FLOATS,)),
    "embedding": (lambda: nn.Embedding(5, 4), (INDEX,)),
    "bag": (lambda: nn.EmbeddingBag(5, 4, mode="sum"), (INDEX,)),
    "bag of weighted sums": (lambda: nn.EmbeddingBag(5, 4, mode="sum"), (INDEX[0], INDEX[1, 2:] - 2, FLOATS[0, 0, :3])),
    "bag of maxima": (lambda: nn.EmbeddingBag(5, 4, mode="max"), (INDEX,)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (PLANE,)),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2), (PLANE,)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3), (PLANE,)),
    "grouped transposed convolution": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (PLANE,)),
    "bilinear": (lambda: nn.Bilinear(5, 5, 6), (FLOATS, FLOATS)),
    "lstm": (lambda: nn.LSTM(5, 4), (FLOATS,)),
    "gru cell": (lambda: nn.GRUCell(5, 4), (FLOATS[0],)),
    "attention": (lambda: nn.MultiheadAttention(5, 1), (FLOATS, FLOATS, FLOATS)),
}


class Holder(nn.Module):
    """One layer, of which the first output counts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.layer(*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("name", KINDS)
def test_it_computes_in_the_bases_dtype_nearly_what_float32_does_and_trains_in_float32(name: str) -> None:
    torch.manual_seed(0)
    build, inputs = KINDS[name]
    model = Holder(build()).bfloat16()
    inject_adapters(model, LoRAConfig(r=2, alpha=3, target_modules="all"))
    randomise(model, scale=0.5)
    inputs = tuple(x.bfloat16() if x.is_floating_point() else x for x in inputs)
    exact = copy.deepcopy(model).float()
    output, expected = model(*inputs), exact(*(x.float() if x.is_floating_point() else x for x in inputs))
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


@pytest.mark.parametrize("name", KINDS)
def test_adapters_are_made_in_the_bases_dtype_if_asked(name: str) -> None:
    model = Holder(KINDS[name][0]()).bfloat16()
    inject_adapters(model, LoRAConfig(r=2, target_modules="all", autocast_adapter_dtype=False))
    assert {p.dtype for p in adapter_state_dict(model).values()} == {torch.bfloat16}


# What adapters are kept in


X = torch.arange(WORDS)
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
    model = three(autocast_adapter_dtype=False).bfloat16()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(
        AdapterMismatchError,
        match="autocast_adapter_dtype=False; this configuration asks for autocast_adapter_dtype=True",
    ):
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
                torch.testing.assert_close(
                    p.grad.double(), q.grad, **near, msg=lambda text, name=name: f"{name}: {text}"
                )


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

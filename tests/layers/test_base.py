"""Layers compute with their update however they are called, with adapters in float32 over a base in half precision."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterMismatchError,
    LoRAConfig,
    adapter_state_dict,
    inject_adapters,
    merge_adapters,
    remove_adapters,
)
from lightning_lora.layers import HAS_UPDATE
from tests.support.cases import Three, three
from tests.support.compared import assert_same_tensors
from tests.support.layers import (
    BAGS,
    FLOATS,
    INDEX,
    LAYERS,
    PLANE,
    Model,
    Scaled,
    adapted,
    config,
    is_float,
)
from tests.support.models import WIDTH, X, randomise


@pytest.mark.parametrize(
    ("layer", "dtype", "rows", "dropout"),
    [
        (nn.Linear(64, 48), torch.float32, 1, 0.0),
        (nn.Linear(64, 48), torch.bfloat16, 400, 0.3),
        (nn.Conv2d(64, 48, 3), torch.bfloat16, 20, 0.0),
        (nn.Conv2d(64, 48, 1), torch.float32, 20, 0.3),
    ],
    ids=str,
)
def test_a_fresh_adapter_changes_no_bit_in_training(layer: nn.Module, dtype: Any, rows: int, dropout: float) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    x = torch.randn(
        rows,
        64,
        *(() if isinstance(layer, nn.Linear) else (5, 5)),
        dtype=dtype,
        requires_grad=True,
    )
    results = []
    for _ in range(2):
        output = model.train()(x)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), x)))
        inject_adapters(model, LoRAConfig(r=4, target_modules="all", dropout=dropout))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_threads_compute_a_layer_with_its_own_forward_rightly() -> None:
    model = nn.Sequential(adapted(Scaled(8, 8)))
    x = torch.randn(4, 8).double()
    with torch.no_grad():
        expected = model(x)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(y, expected) for y in pool.map(model, [x] * 400))


@pytest.mark.parametrize("how", [{}, {"init": "pissa"}, {"use_dora": True}], ids=str)
def test_adapters_on_the_meta_device_begin_when_a_merged_base_is_assigned(how: dict[str, Any]) -> None:
    plain = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(4, 8)
    state: Any = plain.state_dict()
    state._metadata["0"][HAS_UPDATE] = True
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, LoRAConfig(r=2, target_modules="all", **how))
    model.load_state_dict(state, assign=True)
    torch.testing.assert_close(model(x), plain(x))


@pytest.mark.parametrize("name", ["linear", "lstm", "transposed convolution", "experts"])
def test_other_code_may_wrap_the_forward_of_an_adapted_layer(name: str) -> None:
    build, x = LAYERS[name]
    model = Model(build()).double()
    base = model(x)
    inject_adapters(model, config(model))
    randomise(model)
    expected = model(x)
    forward = model[0].forward
    model[0].forward = lambda *args, **kwargs: forward(*args, **kwargs)  # type: ignore[method-assign]
    assert torch.equal(model(x), expected)
    remove_adapters(model)
    assert torch.equal(model(x), base)


def test_what_a_forward_sets_on_its_layer_is_there_afterwards() -> None:
    class Counts(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input)

    model = nn.Sequential(Counts(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    for calls in (1, 2):
        model(torch.ones(4))
        assert model[0].calls == calls


@pytest.mark.parametrize(
    ("layer", "arguments", "dora"),
    [
        (nn.Linear(5, 4), {"input": FLOATS}, False),
        (Conv1D(4, 5), {"x": FLOATS}, True),
        (nn.Embedding(5, 4), {"input": INDEX}, True),
        (nn.EmbeddingBag(5, 4), {"input": BAGS[0], "offsets": BAGS[1]}, False),
        (
            nn.ConvTranspose2d(4, 6, 3, stride=2),
            {"input": PLANE, "output_size": [12, 11]},
            False,
        ),
        (nn.Bilinear(5, 5, 6), {"input1": FLOATS, "input2": FLOATS}, False),
        (nn.GRUCell(5, 4), {"input": FLOATS[0]}, False),
    ],
    ids=str,
)
def test_calls_by_name_and_by_place_compute_the_same(layer: nn.Module, arguments: dict[str, Any], dora: bool) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    base = model[0](**arguments)
    inject_adapters(model, LoRAConfig(r=2, alpha=3, target_modules="all", dropout=0.5, use_dora=dora))
    randomise(model, scale=0.5)
    outputs = []
    for by_name in (True, False):
        torch.manual_seed(1)
        outputs.append(model[0](**arguments) if by_name else model[0](*arguments.values()))
    assert outputs[0].shape == base.shape
    assert not torch.equal(outputs[0], base)
    assert torch.equal(*outputs)


# Adapters are float32 over a base in half precision


KINDS = [
    "linear",
    "scaled",
    "padded embedding",
    "bag",
    "convolution",
    "transposed convolution",
    "bilinear",
    "experts",
]


@pytest.mark.parametrize("name", KINDS)
def test_it_computes_in_the_bases_dtype_nearly_what_float32_does_and_trains_in_float32(name: str) -> None:
    build, x = LAYERS[name]
    model = Model(build()).bfloat16()
    x = tree_map(lambda t: t.bfloat16() if is_float(t) else t, x)
    inject_adapters(model, config(model))
    randomise(model, scale=0.5)
    exact = copy.deepcopy(model).float()
    output = model(x)
    expected = exact(tree_map(lambda t: t.float() if is_float(t) else t, x))
    assert output.dtype is torch.bfloat16
    assert (output.float() - expected).norm() < 0.02 * expected.norm()
    output.float().square().sum().backward()
    expected.square().sum().backward()
    gradients = dict(exact.named_parameters())
    for factor in adapter_state_dict(model):
        p = model.get_parameter(factor)
        q = gradients[factor]
        assert p.dtype is torch.float32
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.dtype is torch.float32
        assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm() + 1e-3


def test_adapters_are_kept_in_float32_over_a_half_precision_base_or_as_the_base_if_asked() -> None:
    model = three()
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    model.linear(torch.ones(WIDTH)).sum().backward()
    model.bfloat16()
    assert_same_tensors(adapter_state_dict(model), before)
    assert model.linear.lora_A.grad.dtype == torch.float32
    assert model.linear.weight.dtype == model(X).dtype == torch.bfloat16
    assert model.double().linear.lora_A.dtype == torch.float64
    assert model.half().linear.lora_A.dtype == torch.float32
    made = Three().bfloat16()
    inject_adapters(made, LoRAConfig(r=2, target_modules="all", autocast_adapter_dtype=False))
    for each in (made, model := three(autocast_adapter_dtype=False).bfloat16()):
        assert {p.dtype for p in each.parameters()} == {torch.bfloat16}
    with pytest.raises(AdapterMismatchError, match=r"dtype=False, not .*dtype=True"):
        inject_adapters(model, LoRAConfig(r=2, target_modules="all"))


@pytest.mark.parametrize("merged", [False, True])
def test_autocast_computes_what_the_base_computes_it_in(merged: bool) -> None:
    model = three()
    exact = three().double()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    base = Three()
    if merged:
        merge_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(X)
        dtype = base(X).dtype
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), exact(X), rtol=0.1, atol=0.1)

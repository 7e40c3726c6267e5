"""Layers compute with their update, however they are called."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject_adapters, merge_adapters
from tests.support.layers import BAGS, FLOATS, INDEX, PLANE, Scaled, config
from tests.support.models import randomise


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rows", [1, 20, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(64, 48), nn.Conv2d(64, 48, 3), nn.Conv2d(64, 48, 1)], ids=repr)
def test_a_fresh_adapter_changes_no_bit_in_training(layer: nn.Module, dtype: Any, rows: int, dropout: float) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    x = torch.randn(rows, 64, *(() if isinstance(layer, nn.Linear) else (5, 5)), dtype=dtype, requires_grad=True)
    results = []
    for _ in range(2):
        output = model.train()(x)
        results.append((output, *torch.autograd.grad(output.float().square().sum(), x)))
        inject_adapters(model, LoRAConfig(r=4, target_modules="all", dropout=dropout))
    for before, after in zip(*results, strict=True):
        assert torch.equal(before, after)


def test_other_threads_and_replicas_compute_a_layer_with_its_own_forward_rightly() -> None:
    model = nn.Sequential(Scaled(8, 8))
    inject_adapters(model, config(model))
    randomise(model)
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = model(x)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(y, expected) for y in pool.map(model, [x] * 400))
        replica: Any = copy.copy(model[0])  # as DataParallel makes one: its parameters are plain attributes
        replica._parameters = {}
        replica.__dict__.update({name: p.detach() for name, p in model[0].named_parameters()})
        assert torch.equal(replica(x), expected)


def test_layer_that_keeps_its_own_methods_or_counts_is_run_with_its_update() -> None:
    class Bound(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.run, self.calls = self.own, 0

        def own(self, x: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.linear(x, self.weight, self.bias)

        def forward(self, input: Tensor) -> Tensor:
            return self.run(input)

    model, x = nn.Sequential(Bound()), torch.randn(2, 4)
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    output = model(x)
    assert model[0].calls == 1 and model[0].run.__self__ is model[0]
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(5, 4), {"input": FLOATS}),
    "conv1d": (lambda: Conv1D(4, 5), {"x": FLOATS}),
    "embedding": (lambda: nn.Embedding(5, 4), {"input": INDEX}),
    "bag": (lambda: nn.EmbeddingBag(5, 4), {"input": BAGS[0], "offsets": BAGS[1]}),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), {"input": PLANE}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), {"input": PLANE, "output_size": [12, 11]}),
    "bilinear": (lambda: nn.Bilinear(5, 5, 6), {"input1": FLOATS, "input2": FLOATS}),
    "lstm": (lambda: nn.LSTM(5, 4), {"input": FLOATS}),
    "gru cell": (lambda: nn.GRUCell(5, 4), {"input": FLOATS[0]}),
    "attention": (lambda: nn.MultiheadAttention(5, 1), {"query": FLOATS, "key": FLOATS, "value": FLOATS}),
}
DORA = ["linear", "conv1d", "embedding", "convolution"]


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "dora"), [*((name, False) for name in CALLS), *((name, True) for name in DORA)])
def test_calls_by_name_and_by_place_compute_the_same(name: str, dora: bool, training: bool) -> None:
    torch.manual_seed(0)
    build, arguments = CALLS[name]
    model = nn.Sequential(build()).double().train(training)
    base = first(model[0](**arguments))
    inject_adapters(model, LoRAConfig(r=2, alpha=3, target_modules="all", dropout=0.5, use_dora=dora))
    randomise(model, scale=0.5)
    outputs = []
    for by_name in (True, False):
        torch.manual_seed(1)
        outputs.append(first(model[0](**arguments) if by_name else model[0](*arguments.values())))
    assert outputs[0].shape == base.shape and not torch.equal(outputs[0], base)
    assert torch.equal(*outputs)

"""A layer can be called by the names of its arguments as it could before, also where an input is dropped."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject_adapters
from tests.models import randomise

FLOATS = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(2, 3, 5)
PLANE = torch.linspace(-1, 1, 200, dtype=torch.float64).view(2, 4, 5, 5)
INDEX, BAGS, OFFSETS = torch.tensor([[0, 3, 1], [4, 4, 2]]), torch.tensor([0, 3, 1, 4, 4]), torch.tensor([0, 2])

CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (lambda: nn.Linear(5, 4), {"input": FLOATS}),
    "conv1d": (lambda: Conv1D(4, 5), {"x": FLOATS}),
    "embedding": (lambda: nn.Embedding(5, 4), {"input": INDEX}),
    "bag": (lambda: nn.EmbeddingBag(5, 4), {"input": BAGS, "offsets": OFFSETS}),
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

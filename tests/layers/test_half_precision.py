"""Over a base in half precision, adapters in float32 meet inputs of another dtype, in layers of every kind."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, adapter_state_dict, inject_adapters
from tests.models import randomise

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

"""Parameters by themselves are adapted as layers are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, TargetError, inject_adapters, merge_adapters, remove_adapters, summarize
from tests.layers.cases import LAYERS, train
from tests.models import state


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(5, 3), LAYERS["experts"][0]()
        self.own, self.attention = nn.Parameter(torch.randn(5, 5)), nn.MultiheadAttention(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x @ self.own) * self.router(x).softmax(-1).sum(-1, keepdim=True)


def test_parameters_are_adapted_beside_layers_or_alone() -> None:
    model = Mixture()
    how = LoRAConfig(r=2, target_modules=["router"], target_parameters=["experts.stack"])
    assert inject_adapters(model, how) == ("router", "experts")
    assert model.experts.lora_A_stack.shape == (3, 2, 5) and model.experts.lora_B_stack.shape == (3, 4, 2)
    assert "Experts" in str(summarize(model))
    remove_adapters(model)
    assert inject_adapters(model, LoRAConfig(r=2, target_modules=[], target_parameters=["stack", "mix"])) == (
        "experts",
    )
    train(model)
    output = model(x := torch.randn(2, 5))
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)


class Reader(nn.Module):
    """A module that calls one layer, and reads the weight of the other, as torchvision's Swin and Mamba do."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight + self.read(x)


def test_weight_that_its_holder_reads_is_adapted_there() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(Reader()), torch.randn(2, 5)
    how = LoRAConfig(r=2, target_parameters=["read.weight"])
    base = state(model)
    assert inject_adapters(model, how) == ("0", "0.called")
    train(model)
    output = model(x)
    update = model[0].lora_B_read_weight @ model[0].lora_A_read_weight
    plain = nn.Sequential(Reader())
    plain.load_state_dict(base)
    with torch.no_grad():
        plain[0].read.weight += update
        plain[0].called.weight += model[0].called.lora_B @ model[0].called.lora_A
    torch.testing.assert_close(output, plain(x))
    output.sum().backward()
    assert model[0].lora_A_read_weight.grad is not None
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    assert list(state(model)) == list(base)
    remove_adapters(model)
    torch.testing.assert_close(model(x), output)


def test_parameters_are_left_out_kept_whole_or_refused_as_layers_are() -> None:
    how: dict[str, Any] = {"r": 2, "target_modules": ["called"], "target_parameters": ["read.weight"]}
    for more in ({"exclude_modules": ["read"]}, {"modules_to_save": ["read"]}):
        model = nn.Sequential(Reader())
        assert inject_adapters(model, LoRAConfig(**how, **more)) == ("0.called",)
    with pytest.raises(TargetError, match="target_slices"):
        inject_adapters(nn.Sequential(Reader()), LoRAConfig(**how, target_slices={"0": ["q"]}))
    twice = nn.Sequential(Reader())
    twice[0].read_weight = nn.Parameter(torch.ones(5, 5))
    with pytest.raises(TargetError, match=r"'read_weight', 'read\.weight' of '0'.*the same name"):
        inject_adapters(twice, LoRAConfig(**how | {"target_parameters": ["read.weight", "read_weight"]}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("own", "belongs to the model itself"),
        ("scale", r"it is \(5,\)"),
        ("router.weight", "belongs to the model itself"),
        ("attention.in_proj_weight", "name 'attention' in target_modules"),
        ("stakc", r"\['stakc'\] match no .*stack"),
    ],
)
def test_parameters_that_cannot_be_adapted_are_refused(name: str, words: str) -> None:
    model = Mixture()
    with pytest.raises(TargetError, match=words):
        inject_adapters(model, LoRAConfig(r=2, target_parameters=[name]))
    assert not [n for n in model.state_dict() if "lora" in n]

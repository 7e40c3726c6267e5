"""Parameters by themselves are adapted as layers are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.layers import LAYERS, train
from tests.support.models import state


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 3)
        self.experts = LAYERS["experts"][0]()
        self.own = nn.Parameter(torch.randn(5, 5))
        self.gru = nn.GRU(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x @ self.own) * self.router(x).softmax(-1).sum(
            -1, keepdim=True
        )


def test_parameters_are_adapted_beside_layers_or_alone() -> None:
    model = Mixture()
    how = ll.LoRAConfig(
        r=2, target_modules=["router"], target_parameters=["experts.stack"]
    )
    assert ll.inject_adapters(model, how) == ("router", "experts")
    assert model.experts.lora_A_stack.shape == (3, 2, 5)
    assert model.experts.lora_B_stack.shape == (3, 4, 2)
    assert "Experts" in str(ll.summarize(model))
    ll.remove_adapters(model)
    how = ll.LoRAConfig(r=2, target_modules=[], target_parameters=["stack", "mix"])
    assert ll.inject_adapters(model, how) == ("experts",)
    train(model)
    x = torch.randn(2, 5)
    output = model(x)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), output)


class Reader(nn.Module):
    """A module that calls one layer, and reads the weight of the other, as torchvision's Swin and Mamba do."""

    def __init__(self) -> None:
        super().__init__()
        self.called = nn.Linear(5, 5)
        self.read = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x) @ self.read.weight + self.read(x)


def test_weight_that_its_holder_reads_is_adapted_there() -> None:
    model = nn.Sequential(Reader())
    x = torch.randn(2, 5)
    plain = copy.deepcopy(model)
    base = list(state(model))
    assert ll.inject_adapters(
        model, ll.LoRAConfig(r=2, alpha=2, target_parameters=["read.weight"])
    ) == ("0", "0.called")
    train(model)
    output = model(x)
    with torch.no_grad():
        plain[0].read.weight += (
            model[0].lora_B_read_weight @ model[0].lora_A_read_weight
        )
        plain[0].called.weight += model[0].called.lora_B @ model[0].called.lora_A
    torch.testing.assert_close(output, plain(x))
    output.sum().backward()
    assert model[0].lora_A_read_weight.grad is not None
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    assert list(state(model)) == base
    ll.remove_adapters(model)
    torch.testing.assert_close(model(x), output)


@pytest.mark.parametrize(
    "more", [{"exclude_modules": ["read"]}, {"modules_to_save": ["read"]}]
)
def test_parameters_are_left_out_or_kept_whole_as_layers_are(more: Any) -> None:
    how: dict[str, Any] = {
        "r": 2,
        "target_modules": ["called"],
        "target_parameters": ["read.weight"],
    }
    model = nn.Sequential(Reader())
    assert ll.inject_adapters(model, ll.LoRAConfig(**how, **more)) == ("0.called",)


def test_patterns_mean_a_parameter_by_its_own_name(tmp_path: Path) -> None:
    how: dict[str, Any] = {
        "r": 2,
        "alpha": 4,
        "target_modules": [],
        "target_parameters": ["stack", "mix"],
    }
    model = Mixture()
    base = Mixture()
    base.load_state_dict(model.state_dict())
    ll.inject_adapters(
        model,
        ll.LoRAConfig(
            **how, rank_pattern={"experts.stack": 3}, alpha_pattern={"mix": 1}
        ),
    )
    train(model)
    for name, rank, scaling in (("stack", 3, 4 / 3), ("mix", 2, 1 / 2)):
        a = getattr(model.experts, f"lora_A_{name}")
        b = getattr(model.experts, f"lora_B_{name}")
        assert a.shape[-2] == rank
        weight = getattr(model.experts, name) + scaling * b @ a
        torch.testing.assert_close(model.experts.lora_effective_weight(name), weight)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.inject_adapters(base, ll.LoRAConfig(**how))
    with pytest.raises(
        ll.AdapterMismatchError,
        match=r"scaling of 1\.33333 in .experts\.stack.; here it has r=2",
    ):
        ll.load_adapter(base, tmp_path / "a.safetensors")


def test_patterns_mean_a_parameter_by_its_module_too() -> None:
    model = Mixture()
    how: dict[str, Any] = {"target_modules": [], "target_parameters": ["stack", "mix"]}
    ll.inject_adapters(
        model, ll.LoRAConfig(r=4, **how, rank_pattern={"experts.mix": 1, "experts": 2})
    )
    assert model.experts.lora_A_stack.shape == (3, 2, 5)
    assert len(model.experts.lora_A_mix) == 1

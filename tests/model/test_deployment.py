"""What torch's ways to deploy a model make of adapted layers."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.models import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.jit and torch.ao

INPUT = torch.linspace(-1, 1, 24).view(3, 8)


def adapted() -> nn.Module:
    """A small network with one adapted layer and one without."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    randomise(model)
    return model.eval()


def merged() -> nn.Module:
    model = adapted()
    ll.merge_adapters(model)
    return model


def export(model: nn.Module) -> Any:
    return torch.export.export(model, (INPUT,)).module()


def trace(model: nn.Module) -> Any:
    return torch.jit.trace(model, INPUT)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def quantised_layers(model: nn.Module) -> list[bool]:
    """Whether each of both layers is quantised by torch."""
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    kind = torch.ao.nn.quantized.dynamic.Linear
    return [isinstance(quantised.get_submodule(name), kind) for name in ("0", "2")]


@pytest.mark.parametrize("deploy", [export, trace, compiled])
@torch.no_grad()
def test_a_deployed_model_computes_the_adapters(deploy: Callable[[nn.Module], Any]) -> None:
    model = adapted()
    here: Tensor = model(INPUT)
    torch.testing.assert_close(deploy(model)(INPUT), here)
    with ll.disable_adapters(model):
        base: Tensor = model(INPUT)
    assert (here - base).abs().max() > 1e-3


@torch.no_grad()
def test_a_script_needs_merged_weights() -> None:
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(adapted())
    torch.testing.assert_close(torch.jit.script(merged())(INPUT), adapted()(INPUT))


def test_torch_quantises_merged_layers_only() -> None:
    assert quantised_layers(adapted()) == [False, True]
    assert quantised_layers(merged()) == [True, True]

"""Slices of a convolution are channels that it writes."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetError, adapter_state_dict, inject_adapters
from tests.models import randomise

PLANE = torch.linspace(-1, 1, 200, dtype=torch.float64).view(2, 4, 5, 5)
SLICES = {"0": {"few": [1, 3], "last": [5, 6]}}


@pytest.mark.parametrize("groups", [1, 2])
def test_slices_of_a_convolution_are_channels_that_it_writes(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups)).double()
    plain = copy.deepcopy(model)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["0"], target_slices=SLICES))
    assert torch.equal(model(PLANE), plain(PLANE))
    randomise(model)
    output = model(PLANE)
    factors = adapter_state_dict(model)
    with torch.no_grad():
        for part, rows in (("few", slice(1, 3)), ("last", slice(5, 6))):
            update = factors[f"0.lora_B_{part}"] @ factors[f"0.lora_A_{part}"]
            plain[0].weight[rows] += update.view_as(plain[0].weight[rows])
    torch.testing.assert_close(output, plain(PLANE))


def test_a_transposed_convolution_has_no_parts() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    with pytest.raises(TargetError, match="'0' is a ConvTranspose2d, which has no parts for target_slices"):
        inject_adapters(model, LoRAConfig(r=2, target_modules=["0"], target_slices=SLICES))


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_transposed_convolution_has_its_bias_once(groups: int, batched: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, (3, 2), groups=groups)).double()
    plain = copy.deepcopy(model)
    inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    randomise(model)
    factors = adapter_state_dict(model)
    with torch.no_grad():
        update = factors["0.lora_B"] @ factors["0.lora_A"]
        plain[0].weight += update.T.reshape(plain[0].weight.shape)
    x = PLANE if batched else PLANE[0]
    torch.testing.assert_close(model(x), plain(x))

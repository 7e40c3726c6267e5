"""Slices of a convolution are channels that it writes, and its update has its layout."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetError, adapter_state_dict, inject_adapters, merge_adapters
from tests.support.layers import PLANE
from tests.support.models import randomise

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


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("change", [{"stride": 2}, {"padding": 1}, {"padding": 0}, {"dilation": 2}, {"stride": (2,)}])
def test_a_geometry_that_is_set_later_may_be_one_number(change: dict[str, Any], kernel: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, kernel))
    vars(model[0]).update(change)
    plain, x = copy.deepcopy(model), torch.randn(2, 4, 7, 6).contiguous(memory_format=torch.channels_last)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["0"]))
    torch.testing.assert_close(model(x), plain(x))
    randomise(model)
    output = model(x)
    output.sum().backward()
    merge_adapters(model)
    torch.testing.assert_close(output, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_output_has_the_layers_own_memory_format(kernel: int, channels_last: bool, size: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, kernel, padding=kernel // 2))
    x = torch.randn(3, *size, 4).movedim(-1, 1) if channels_last else torch.randn(3, 4, *size)
    expected = model(x)
    inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    found = model(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(4, 6, 3)])
def test_many_adapters_of_one_convolution_are_computed_by_vmap(layer: nn.Module) -> None:
    model = nn.Sequential(copy.deepcopy(layer)).double()
    inject_adapters(model, LoRAConfig(r=2, target_modules="all"))
    trained = [(name, p.shape) for name, p in model.named_parameters() if p.requires_grad]
    many = {name: torch.randn(3, *shape, dtype=torch.float64) for name, shape in trained}

    def compute(factors: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, factors, (PLANE,))  # type: ignore[no-any-return]

    found = torch.func.vmap(compute)(many)
    one_by_one = torch.stack([compute({name: t[i] for name, t in many.items()}) for i in range(3)])
    torch.testing.assert_close(found, one_by_one)

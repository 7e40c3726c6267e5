"""A layer smaller than ``r`` gets its largest rank, with the scaling that was asked."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import Role
from tests.support.compared import assert_same_tensors
from tests.support.layers import LAYERS, Model, config, factors, reference
from tests.support.models import as_trained, randomise


@pytest.mark.parametrize(
    ("kind", "alpha", "use_rslora"),
    [
        ("linear", 12, True),
        ("bag", 96, False),
        ("grouped convolution", 96, False),
        ("bilinear", 96, False),
        ("attention to others", 96, False),
        ("experts", 96, False),
    ],
)
def test_every_kind_of_layer_takes_a_rank_above_its_sides(
    kind: str, alpha: float, use_rslora: bool
) -> None:
    build, x = LAYERS[kind]
    model = Model(build()).double()
    ll.inject_adapters(model, config(model, r=64, alpha=alpha, use_rslora=use_rslora))
    layer: Any = model[0]
    for part in layer.lora_matrices:
        factor = layer.get_parameter(part.parameter_name(Role.A))
        assert factor.shape[-2] == min(part.reads, part.writes)
    randomise(model)
    output = model(x)
    expected = reference(model, factors(layer), x)  # with the scaling of r=64: 1.5
    torch.testing.assert_close(output, expected)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), output)


def test_a_larger_rank_that_gives_the_same_adapters_reads_the_same_file(
    tmp_path: Path,
) -> None:
    base = nn.Sequential(nn.Linear(1, 16), nn.Linear(16, 1))
    small = as_trained(copy.deepcopy(base), seed=4, r=4, alpha=8)
    model = as_trained(copy.deepcopy(base), seed=8, r=8, alpha=16)
    ll.save_adapter(small, tmp_path / "small.safetensors")
    ll.load_adapter(model, tmp_path / "small.safetensors")
    assert_same_tensors(ll.adapter_state_dict(model), ll.adapter_state_dict(small))
    assert "r=1, " in repr(model[0])

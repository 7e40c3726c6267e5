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
    ("kind", "alpha"),
    [("linear", 12), ("bag", 96), ("grouped convolution", 96), ("bilinear", 96), ("attention to others", 96),
     ("experts", 96)],
)  # fmt: skip
def test_every_kind_of_layer_takes_a_rank_above_its_sides(kind: str, alpha: float) -> None:
    build, x = LAYERS[kind]
    model = Model(build()).double()
    ll.inject_adapters(model, config(model, r=64, alpha=alpha, use_rslora=alpha == 12))
    layer: Any = model[0]
    for part in layer.lora_matrices:
        assert getattr(layer, part.parameter(Role.A)).shape[-2] == min(part.reads, part.writes)
    randomise(model)
    output = model(x)
    torch.testing.assert_close(output, reference(model, factors(layer), x))  # with the scaling of r=64: 1.5
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), output)


def test_a_larger_rank_that_gives_the_same_adapters_reads_the_same_file(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(1, 16), nn.Linear(16, 1))
    small, model = (as_trained(copy.deepcopy(base), seed=r, r=r, alpha=2 * r) for r in (4, 8))
    ll.save_adapter(small, tmp_path / "small.safetensors")
    ll.load_adapter(model, tmp_path / "small.safetensors")
    assert_same_tensors(ll.adapter_state_dict(model), ll.adapter_state_dict(small))
    assert "r=1, " in repr(model[0])

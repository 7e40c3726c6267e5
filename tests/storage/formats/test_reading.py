"""PEFT's files load, and give the outputs that PEFT gives."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import export_peft, load_adapter
from tests.support.compared import assert_holds
from tests.support.models import Around
from tests.support.peft_export import read
from tests.support.peft_reading import (
    Attending,
    Expert,
    Images,
    Mixed,
    built,
    gap,
    write_peft,
)

INDEX = torch.arange(12).view(2, 6)
IMAGES = torch.linspace(-1, 1, 2 * 3 * 9 * 9).view(2, 3, 9, 9)
TOKENS = torch.linspace(-1, 1, 2 * 4 * 8).view(2, 4, 8).sin()


def parameters(*names: str, **more: Any) -> dict[str, Any]:
    """A configuration that names parameters alone."""
    return {"target_modules": [], "target_parameters": list(names), **more}


BOTH = ["experts.up", "experts.down"]
PISSA = {"init_lora_weights": "pissa"}
MIXED: list[dict[str, Any]] = [
    {"target_modules": ["embed", "conv1d", "linear", "c_proj"], "lora_alpha": 5},
    {
        "target_modules": ["embed", "conv1d", "linear", "c_proj"],
        "lora_alpha": 3,
        "use_rslora": True,
        "use_dora": True,
    },
    {
        "target_modules": "(embed|linear|c_.*)",
        "rank_pattern": {"lin.*": 4, "near": 3, "embed": 1},
    }
    | {"alpha_pattern": {"^c_proj": 7, "embed": 9}},
    {
        "target_modules": ["linear"],
        "bias": "lora_only",
        "modules_to_save": ["head", "norm"],
    },
    {"target_modules": ["linear"], "trainable_token_indices": {"embed": [1, 4, 7]}},
    {"target_modules": ["linear", "c_proj"], **PISSA, "use_rslora": True},
    {"target_modules": ["linear", "head"], **PISSA, "r": 16, "use_dora": True},
    {"target_modules": ["linear"], "init_lora_weights": "olora"},
    {
        "target_modules": "all-linear",
        "exclude_modules": ["head"],
        "init_lora_weights": "gaussian",
    },
    parameters("linear.weight", "embed.weight"),
    parameters("linear.weight", "c_proj.weight", rank_pattern={"c_proj.weight": 2})
    | {"alpha_pattern": {"linear.weight": 32, "c_proj": 64}},
]
ATTENDING: list[dict[str, Any]] = [
    {"r": 12, "target_modules": ["attn", "out"], "bias": "lora_only"},
    {"target_modules": ["attn"], "bias": "all", "use_rslora": True},
    parameters("attn.in_proj_weight"),
]
STACKED: list[dict[str, Any]] = [
    parameters(*BOTH, r=9),
    parameters("gate", "experts.up"),
    parameters(
        *BOTH, rank_pattern={"experts.up": 1}, alpha_pattern={"experts.down": 3}
    ),
    parameters("rnn.weight_ih_l0", "rnn.weight_hh_l0"),
]
IMAGE: list[dict[str, Any]] = [
    {"target_modules": ["conv2d", "conv3d"], "use_dora": True},
    {"target_modules": ["conv2d", "conv3d"], "r": 40, "modules_to_save": ["bn"]},
]
MODELS: list[tuple[Any, Tensor, list[dict[str, Any]]]] = [
    (Mixed, INDEX, MIXED),
    (Attending, TOKENS, ATTENDING),
    (Expert, TOKENS, STACKED),
    (partial(Expert, is_transposed=True), TOKENS, STACKED[:-1]),
    (Images, IMAGES, IMAGE),
]
CASES = [
    (make, inputs, config) for make, inputs, configs in MODELS for config in configs
]


@pytest.mark.parametrize(("make", "inputs", "config"), CASES)
def test_outputs_are_those_of_peft(
    tmp_path: Path, make: Any, inputs: Any, config: Any
) -> None:
    expected = write_peft(tmp_path / "peft", built(make), **config)(inputs)
    loaded = built(make)
    around = Around(built(make)).eval()
    assert gap(loaded(inputs), expected) > 1e-3
    for model, path in (
        (loaded, tmp_path / "peft"),
        (around, tmp_path / "peft" / "adapter_model.safetensors"),
    ):
        load_adapter(model, path)
        assert gap(model(inputs), expected) < 2e-6


@pytest.mark.parametrize("layer", ["linear", "c_proj"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_the_layer_tells_whether_its_weight_is_transposed_and_not_the_file(
    tmp_path: Path, layer: str, is_transposed: bool
) -> None:
    """PEFT itself corrects what its file says, with a warning."""
    theirs = write_peft(
        tmp_path / "peft",
        built(Mixed),
        target_modules=[layer],
        fan_in_fan_out=is_transposed,
    )
    config_file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "fan_in_fan_out": is_transposed}))
    model = built(Mixed)
    load_adapter(model, tmp_path / "peft")
    assert gap(model(INDEX), theirs(INDEX)) < 2e-6


class Heads(nn.Module):  # two heads in an nn.ModuleDict, which PEFT cannot save whole
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({"de": nn.Linear(8, 3), "fr": nn.Linear(8, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads["de"](self.q(x)) + self.heads["fr"](x)


@pytest.mark.parametrize("saved", [["de", "fr"], ["heads.fr"]])
def test_modules_inside_of_a_container_are_saved_by_their_own_names(
    tmp_path: Path, saved: list[str]
) -> None:
    write_peft(
        tmp_path / "there", built(Heads), target_modules=["q"], modules_to_save=saved
    )
    model = built(Heads)
    load_adapter(model, tmp_path / "there")
    export_peft(model, tmp_path / "here")
    there, here = (
        load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("there", "here")
    )
    assert there.keys() == here.keys()
    assert_holds(there, here)
    assert gap(read(built(Heads), tmp_path / "here")(TOKENS), model(TOKENS)) < 2e-6

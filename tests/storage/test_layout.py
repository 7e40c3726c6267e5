"""A file says what each adapted layer is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_lora import AdapterFileError, BaseMismatchError, load_adapter, merge_adapters, save_adapter
from lightning_lora.layers.convolution import LoRAConvNd
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.model.view import View, root_of
from lightning_lora.storage.stored import KEY
from lightning_lora.storage.stored_layers import StoredLayer, layers_of
from tests.support.cases import three
from tests.support.models import LitTiny, TinyLM, as_trained, unties
from tests.support.storage import fitted, rewrite


class Every(nn.Module):
    """Layers of several kinds, a stack of experts, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.linear = nn.Linear(8, 6)
        self.conv = nn.Conv2d(4, 8, 3, groups=2, dilation=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.fused = nn.Linear(8, 24)
        self.experts = Experts()


class Experts(nn.Module):
    is_transposed = True

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.up


LAYERS = ["embed", "linear", "conv", "attention", "fused", "experts"]


def every() -> Every:
    slices = {"fused": {"q": (0, 8), "v": (16, 24)}}
    parts = {"target_parameters": ["experts.up"], "target_slices": slices, "rank_pattern": {"linear": 1}}
    return as_trained(Every(), r=2, alpha=3, target_modules=[*LAYERS[:-1]], **parts)  # type: ignore[no-any-return]


def described(model: nn.Module) -> dict[str, StoredLayer]:
    return {layer.name: layer for layer in layers_of(View(model))}


def test_each_layer_is_described() -> None:
    layers = described(every())
    assert list(layers) == LAYERS
    assert (layers["linear"].r, layers["linear"].scaling, layers["embed"].scaling) == (1, 3.0, 1.5)
    assert layers["linear"].adapter_class is LoRALinear and layers["conv"].adapter_class is LoRAConvNd
    assert layers["conv"].shapes == {"weight": (8, 2, 3, 3)}
    assert layers["conv"].options == {"groups": 2, "dilation": (2, 2), "padding_mode": "zeros"}
    assert layers["embed"].tied == {"weight": ("head.weight",)} and not layers["linear"].tied
    assert [(part.name, part.first, part.rows) for part in layers["fused"].matrices] == [("q", 0, 24), ("v", 16, 24)]
    assert layers["attention"].shapes == {"in_proj_weight": (24, 8), "out_proj.weight": (8, 8)}
    assert layers["experts"].matrices[0].stack == (3,) and layers["experts"].options == {"is_transposed": True}
    assert [name for name, layer in layers.items() if not layer.is_additive] == ["attention", "experts"]
    assert layers["linear"].layer_class == "torch.nn.modules.linear.Linear"


@unties
def test_a_merged_model_is_described_alike() -> None:
    model = every()
    before = described(model)
    merge_adapters(model)
    assert described(model) == before  # ties too: they are the base's


def test_both_kinds_of_files_hold_the_descriptions(tmp_path: Path) -> None:
    model = fitted(tmp_path / "a.ckpt", LitTiny(), max_steps=1)
    save_adapter(model, tmp_path / "a.safetensors")
    in_checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)[KEY]
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        in_file = json.loads(file.metadata()[KEY])
    assert in_checkpoint["layers"] == in_file["layers"] == [layer.to_dict() for layer in layers_of(View(model))]
    assert in_checkpoint["root"] == in_file["root"] == ""


def write(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Write a file of three layers whose description is changed."""
    save_adapter(three(), path)
    return rewrite(path, lambda about, _: change(about))


@pytest.mark.parametrize(
    "break_it",
    [
        lambda about: about["layers"][0].pop("kind"),
        lambda about: about["layers"][0].update(r="2"),
        lambda about: about["layers"][0].update(shapes={}),
        lambda about: about["layers"][0]["parts"][0].update(first=-1),
        lambda about: about["layers"][0]["parts"][0].update(more=1),
        lambda about: about["layers"][0]["tied"].update(weight=[1]),
        lambda about: about["layers"].append("layer"),
        lambda about: about["base"][0]["rounded"].popitem(),
        lambda about: about["base"][0]["digests"].append(-1),
        lambda about: about["base"][0].update(dtypes=["nn"]),
        lambda about: about["base"][0].pop("layout"),
    ],
)
def test_a_description_of_another_form_is_refused(tmp_path: Path, break_it: Any) -> None:
    with pytest.raises(AdapterFileError, match="did not write"):
        load_adapter(three(), write(tmp_path / "odd.safetensors", break_it))


def test_what_earlier_versions_wrote_or_left_out_is_no_damage(tmp_path: Path) -> None:
    def earlier(about: dict[str, Any]) -> None:
        about.update(run={"noted": 1, "loops": 2}, copies=[])
        del about["random"], about["saved"], about["layers"][0]["parts"][0]["tokens"]

    path = write(tmp_path / "a.safetensors", earlier)
    with pytest.raises(BaseMismatchError):  # which is compared last
        load_adapter(three(), path)


def test_the_root_is_the_one_model_inside() -> None:
    class Around(LitTiny):
        def __init__(self, *models: nn.Module) -> None:
            super().__init__()
            del self.embed, self.q_proj, self.v_proj, self.head
            for i, model in enumerate(models):
                self.add_module(f"model{i}", model)

    transformer = type("PreTrainedModel", (TinyLM,), {})
    assert root_of(TinyLM()) == root_of(LitTiny()) == root_of(transformer()) == ""
    assert root_of(Around(TinyLM(), nn.ReLU())) == "model0"
    assert root_of(Around(TinyLM(), TinyLM())) == ""
    assert root_of(Around(nn.Linear(2, 2), transformer())) == "model1"
    assert root_of(Around(transformer(), transformer())) == ""
    assert root_of(nn.Sequential(nn.Sequential(transformer()))) == "0.0"

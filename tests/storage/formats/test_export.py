"""peft computes, from an exported directory, what is computed here."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, LoRAWarning, adapter_state_dict, export_peft, save_adapter
from tests.support.models import WIDTH, WORDS, TinyLM
from tests.support.peft_export import check_equal, check_read, read, trained
from tests.support.peft_reading import Attending, Experts

INDEX = torch.arange(12).view(3, 4) % WORDS


class Layers(nn.Module):
    """An embedding, linear layers, and a Conv1D, with names that are the ends of others."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.q, self.conv1d = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), Conv1D(12, WIDTH)
        nn.init.normal_(self.conv1d.weight, std=0.3)
        self.inner = nn.ModuleDict({"q": nn.Linear(12, WIDTH)})
        self.norm, self.pre_head, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, index: Tensor) -> Tensor:
        x = self.q(self.embed(index)).tanh()
        return self.head(self.pre_head(self.norm(self.inner["q"](self.conv1d(x).tanh()))))


LINEAR: list[dict[str, Any]] = [
    {"target_modules": "all", "alpha": 5},
    {"target_modules": ["conv1d"]},
    {"target_modules": ["embed", "q"], "rank_pattern": {"^q": 5, "inner.q": 1}, "alpha_pattern": {"inner.q": 7}},
    {"target_modules": "all", "use_rslora": True, "alpha": 3, "rank_pattern": {"embed": 4}},
    {"target_modules": ["q", "conv1d", "head"], "init": "pissa", "alpha": 5},
    {"target_modules": ["q", "conv1d"], "init": "olora", "use_rslora": True},
    {"target_modules": "all", "use_dora": True, "alpha": 5, "rank_pattern": {"head": 1}},
    {"target_modules": "all", "r": 64, "alpha": 7, "use_rslora": True, "rank_pattern": {"q": 3}},
    {"target_modules": "q", "use_dora": True, "init": "pissa", "bias": "lora_only"},
    {"target_modules": ["q"], "modules_to_save": ["pre_head", "head", "norm"], "bias": "all"},
    {"target_modules": ["q"], "target_slices": {"q": {"a": (4, 8)}}, "init": "pissa", "use_rslora": True},
]


@pytest.mark.parametrize("config", LINEAR)
def test_linear_and_embedding_layers(config: dict[str, Any], tmp_path: Path) -> None:
    check_read(Layers(), LoRAConfig(**{"r": 2} | config), lambda model: model(INDEX), tmp_path)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv1d(4, 6, 3, padding=1), nn.Conv2d(6, 8, (3, 2), stride=2, bias=False)
        self.c3, self.norm = nn.Conv3d(8, 4, (1, 3, 3), padding="same"), nn.BatchNorm3d(4)
        self.norm.running_mean.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.c1(x).tanh().unsqueeze(-1).expand(-1, -1, -1, 6)
        return self.norm(self.c3(self.c2(x).tanh().unsqueeze(2)))


CONVOLUTIONS: list[dict[str, Any]] = [
    {"use_dora": True, "modules_to_save": ["norm"]},
    {"init": "pissa", "bias": "lora_only", "alpha": 3, "rank_pattern": {"c2": 3}, "use_rslora": True},
    {"r": 9, "alpha": 5},
    {"r": 5, "alpha": 5, "use_rslora": True, "target_slices": {"c2": {"a": (0, 3), "b": (4, 8)}}},
]


@pytest.mark.parametrize("config", CONVOLUTIONS)
def test_convolutions(config: dict[str, Any], tmp_path: Path) -> None:
    config = LoRAConfig(**{"r": 2, "target_modules": ["c1", "c2", "c3"]} | config)
    check_read(Convolutions(), config, lambda model: model(torch.ones(2, 4, 9).cumsum(-1) / 9), tmp_path)


ATTENTION: list[tuple[list[str], dict[str, Any]]] = [
    (["q"], {"bias": "lora_only"}),
    (["v", "k"], {"bias": "all", "init": "olora", "alpha": 3}),
    (["q", "k", "v"], {}),
    (["q", "k", "v"], {"r": 20}),
]


@pytest.mark.parametrize(("parts", "more"), ATTENTION)
def test_attention(parts: list[str], more: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(2, 5, WIDTH)
    how: dict[str, Any] = {"target_modules": ["attn", "out"], "target_slices": {"attn": parts}}
    check_read(Attending(), LoRAConfig(**{"r": 2, **how, **more}), lambda model: model(x), tmp_path)


class Recurrent(nn.Module):
    def __init__(self, kind: Any = nn.LSTM, **kwargs: Any) -> None:
        super().__init__()
        self.rnn = kind(3, WIDTH, **kwargs)
        self.head = nn.Linear(kwargs.get("proj_size", WIDTH) * (1 + kwargs.get("bidirectional", False)), 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(
    ("model", "config"),
    [
        (Recurrent(num_layers=2, bidirectional=True), {"bias": "lora_only", "alpha": 5}),
        (Recurrent(proj_size=5), {"dropout": 0.5, "bias": "all"}),
        (Recurrent(nn.GRU), {"target_slices": {"rnn": ["hh_l0", "ih_l0"]}, "use_rslora": True}),
        (Recurrent(nn.RNN), {"r": 30, "alpha": 7, "init": "pissa"}),
    ],
)
def test_recurrent_layers(model: Recurrent, config: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(6, 2, 3)  # weight_ih has less columns than r: its rank is smaller
    check_read(model, LoRAConfig(**{"r": 4, "target_modules": ["rnn", "head"]} | config), lambda m: m(x), tmp_path)


def around(experts: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(experts=experts))


EXPERTS: list[tuple[bool, dict[str, Any]]] = [
    (False, {"target_parameters": ["experts.down", "experts.gate", "up"], "alpha": 5}),
    (True, {"target_parameters": ["experts.down", "experts.up"], "init": "pissa", "use_rslora": True}),
    (True, {"target_parameters": ["up", "gate"], "target_modules": ["fc"], "rank_pattern": {"fc": 1}, "dropout": 0.5}),
    (False, {"target_parameters": ["experts.up"], "target_modules": ["fc"], "bias": "all"}),
    (False, {"target_parameters": ["experts.up", "gate"], "r": 30, "alpha": 7}),
    (True, {"target_parameters": ["up", "down"], "rank_pattern": {"up": 1}, "alpha_pattern": {"down": 5}, "alpha": 3}),
]


@pytest.mark.parametrize(("is_transposed", "config"), EXPERTS)
def test_experts(is_transposed: bool, config: dict[str, Any], tmp_path: Path) -> None:
    base, x = nn.Sequential(around(Experts(is_transposed=is_transposed))), torch.randn(1, 6, WIDTH)
    check_read(base, LoRAConfig(**{"r": 2, "target_modules": []} | config), lambda m: m(x), tmp_path)


def test_one_expert(tmp_path: Path) -> None:
    config = LoRAConfig(r=2, target_modules=[], target_parameters=["up", "down"])
    check_read(around(Experts(experts=1)), config, lambda m: m(torch.ones(1, 6, WIDTH).cumsum(1)), tmp_path)


def test_layers_inside_of_a_module_with_parameters(tmp_path: Path) -> None:
    class Block(Attending):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.u = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x @ self.v) @ self.u

    x = torch.randn(2, 5, WIDTH)
    config = LoRAConfig(
        r=2, target_parameters=["experts.v", "experts.u"], target_slices={"attn": ["q", "v"]}, bias="all"
    )
    check_read(around(Block()), config, lambda m: m(x), tmp_path)


@pytest.mark.parametrize(("bits", "r"), [(4, 100), (8, 2)])
def test_quantised_layers(bits: int, r: int, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    wide = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    layer = wide if bits == 4 else bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    base = nn.Sequential(nn.Embedding(WORDS, 64), layer, nn.Linear(64, 3)).to("cpu")  # which quantises it
    config = LoRAConfig(r=r, alpha=r, target_modules="all", rank_pattern={"1": 3} if r == 2 else None)
    model = trained(base, config)
    save_adapter(model, tmp_path / "adapter.safetensors")
    for i, source in enumerate((model, tmp_path / "adapter.safetensors")):
        export_peft(source, tmp_path / str(i))
        with torch.no_grad():  # in train mode: for eval mode, bitsandbytes rounds four-bit weights once more
            check_equal(read(base, tmp_path / str(i)).train()(INDEX), model.train()(INDEX))


def test_half_precision(tmp_path: Path) -> None:
    """Differences of factors that started from the weight are taken in float32."""
    base, config = Layers().bfloat16(), {"r": 2, "target_modules": ["q", "head"], "init": "pissa"}
    model = trained(base, LoRAConfig(**config, autocast_adapter_dtype=False), scale=0.01)
    export_peft(model, tmp_path / "peft")
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    state = adapter_state_dict(model)
    a, a0, b, b0 = (state[f"q.lora_{letter}"].double() for letter in ("A", "A0", "B", "B0"))
    there = {name[-13:]: value.double() for name, value in tensors.items() if ".q.lora" in name}
    check_equal(there["lora_B.weight"] @ there["lora_A.weight"], b @ a - b0 @ a0)


def test_names_are_exact(tmp_path: Path) -> None:
    """A list is shorter, but "q" would also mean "inner.q"; the names beside a file's layers are not known."""
    model = trained(Layers(), LoRAConfig(r=2, target_modules="q"))
    save_adapter(model, tmp_path / "a.safetensors")
    everything = trained(Layers(), LoRAConfig(r=2, target_modules="all"))
    names = ["embed", "q", "conv1d", "inner.q", "pre_head", "head"]
    for source, expected in ((everything, names), (model, "q"), (tmp_path / "a.safetensors", "q")):
        export_peft(source, tmp_path / "peft")
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        assert config["target_modules"] == expected


@pytest.mark.parametrize("name", ["embed", "lm_head"])
def test_a_tied_weight_is_adapted_in_one_use_and_named(name: str, tmp_path: Path) -> None:
    """PEFT's own merge changes both."""
    base = TinyLM().eval()
    model = trained(base, LoRAConfig(r=2, target_modules=[name, "q_proj"]))
    save_adapter(model, tmp_path / "adapter.safetensors")
    for source in (model, tmp_path / "adapter.safetensors"):
        with pytest.warns(LoRAWarning, match=rf"weights of '{name}' are also .* merge_and_unload\(\).* save_merged"):
            export_peft(source, tmp_path / "peft")
    with torch.no_grad():
        check_equal(read(base, tmp_path / "peft")(INDEX), model(INDEX))
        merged = read(base, tmp_path / "peft", merged=True)(INDEX)
    assert (merged - model(INDEX)).norm() > 0.03 * merged.norm()


def test_encoder_in_eval_mode_is_named(tmp_path: Path) -> None:
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 2).eval()
    model = trained(base, LoRAConfig(r=2, target_modules="all", target_slices={"self_attn": ["q", "v"]}))
    with pytest.warns(LoRAWarning, match=r"'layers.0', 'layers.1' are .* merge_and_unload"):
        export_peft(model, tmp_path / "peft")
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        check_equal(read(base, tmp_path / "peft", merged=True)(x), model(x))


def test_uniform_has_one_rank_and_one_alpha(tmp_path: Path) -> None:
    patterns: dict[str, Any] = {"rank_pattern": {"q": 7}, "alpha_pattern": {"embed": 9}}
    model = trained(Layers(), LoRAConfig(r=2, alpha=3, use_rslora=True, target_modules="all", **patterns))
    export_peft(model, tmp_path / "peft", uniform=True)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"], config["r"], config["use_rslora"]) == ({}, {}, 7, False)
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {min(value.shape) for value in tensors.values()} == {7, 5}  # the head has 5 rows

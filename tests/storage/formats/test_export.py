"""peft computes, from an exported directory, what is computed here."""

import json
from collections import OrderedDict
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    LoRAWarning,
    adapter_state_dict,
    export_peft,
    load_adapter,
    save_adapter,
)
from tests.storage.formats.test_reading import IMAGES, INDEX
from tests.support.models import WIDTH, WORDS, TinyLM
from tests.support.peft_export import check_equal, check_read, read, trained
from tests.support.peft_reading import Attending, Experts, Images, Mixed

TOKENS = torch.linspace(-1, 1, 2 * 5 * WIDTH).view(2, 5, WIDTH).sin()
SHORT = TOKENS[..., :3]
MIXED: list[dict[str, Any]] = [
    {"target_modules": "all", "alpha": 5},
    {
        "target_modules": ["c_proj"],
        "target_slices": {"c_proj": {"a": (0, 3), "b": (6, 8)}},
    },
    {
        "target_modules": ["embed", "linear"],
        "rank_pattern": {"linear": 5},
        "alpha_pattern": {"embed": 7},
    },
    {"target_modules": ["linear", "c_proj", "head"], "init": "pissa", "alpha": 5},
    {"target_modules": ["linear", "c_proj"], "init": "olora", "use_rslora": True},
    {
        "target_modules": "all",
        "use_dora": True,
        "alpha": 5,
        "rank_pattern": {"head": 1},
    },
    {
        "target_modules": "all",
        "r": 64,
        "alpha": 7,
        "use_rslora": True,
        "rank_pattern": {"linear": 3},
    },
    {"target_modules": ["linear"], "modules_to_save": ["head", "norm"], "bias": "all"},
    {
        "target_modules": ["linear"],
        "target_slices": {"linear": {"a": (4, 8)}},
        "init": "pissa",
        "use_rslora": True,
    },
]
CONVOLUTIONS: list[dict[str, Any]] = [
    {
        "target_modules": ["conv2d", "conv3d"],
        "use_dora": True,
        "modules_to_save": ["bn"],
    },
    {"r": 50, "alpha": 5, "use_rslora": True, "target_modules": ["conv2d"]}
    | {"target_slices": {"conv2d": {"a": (0, 2), "b": (3, 6)}}},
]
ATTENTION: list[dict[str, Any]] = [
    {"target_slices": {"attn": ["v", "k"]}, "bias": "all", "init": "olora", "alpha": 3},
    {"target_slices": {"attn": ["q", "k", "v"]}, "r": 20},
]
EXPERTS: list[dict[str, Any]] = [
    {"target_parameters": ["experts.down", "experts.gate", "up"], "alpha": 5},
    {
        "target_parameters": ["experts.down", "experts.up"],
        "init": "pissa",
        "use_rslora": True,
    },
    {
        "target_parameters": ["up", "gate"],
        "target_modules": ["fc"],
        "rank_pattern": {"fc": 1},
        "dropout": 0.5,
    },
    {
        "target_parameters": ["up", "down"],
        "rank_pattern": {"up": 1},
        "alpha_pattern": {"down": 5},
        "alpha": 3,
    },
]
INSIDE = {
    "target_parameters": ["experts.v", "experts.u"],
    "target_slices": {"attn": ["q", "v"]},
    "bias": "all",
}


class Block(Attending):  # layers inside of a module with parameters
    def __init__(self) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.u = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.v) @ self.u


TRANSPOSED: list[tuple[nn.Module, dict[str, Any], bool]] = [
    (Mixed(), {"target_modules": ["c_proj"]}, True),
    (Mixed(), {"target_modules": ["c_proj", "embed"]}, True),
    (Mixed(), {"target_modules": ["c_proj", "linear"]}, False),
    (Mixed(), {"target_modules": ["linear"]}, False),
    (
        nn.Sequential(Conv1D(8, 8), Experts()),
        {"target_modules": ["0"], "target_parameters": ["1.up"]},
        False,
    ),
]


@pytest.mark.parametrize(("base", "config", "is_told"), TRANSPOSED)
def test_peft_is_told_that_weights_are_transposed_if_no_others_are_beside(
    tmp_path: Path, base: nn.Module, config: dict[str, Any], is_told: bool
) -> None:
    export_peft(trained(base, LoRAConfig(r=2, **config)), tmp_path / "peft")
    written = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert written["fan_in_fan_out"] is is_told


class Recurrent(nn.Module):
    """A recurrent layer, and a head for what it puts out."""

    def __init__(self, kind: Any = nn.LSTM, **kwargs: Any) -> None:
        super().__init__()
        self.rnn = kind(3, WIDTH, **kwargs)
        width = kwargs.get("proj_size", WIDTH)
        if kwargs.get("bidirectional"):
            width *= 2
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.rnn(x)
        return self.head(output)


def around(experts: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(experts=experts))


MODELS: list[tuple[Callable[[], nn.Module], Tensor, list[dict[str, Any]]]] = [
    (Mixed, INDEX, MIXED),
    (Images, IMAGES, CONVOLUTIONS),
    (Attending, TOKENS, ATTENTION),
    (lambda: around(Block()), TOKENS, [INSIDE]),
    (
        lambda: around(Experts()),
        TOKENS,
        [{"target_modules": [], **config} for config in EXPERTS],
    ),
    (
        lambda: around(Experts(is_transposed=True)),
        TOKENS,
        [{"target_modules": [], **config} for config in EXPERTS],
    ),
    (
        lambda: around(Experts(experts=1)),
        TOKENS,
        [{"target_modules": [], "target_parameters": ["up", "down"]}],
    ),
    # weight_ih has less columns than r: its rank is smaller
    (
        partial(Recurrent, num_layers=2, bidirectional=True),
        SHORT,
        [{"r": 4, "bias": "lora_only", "alpha": 5}],
    ),
    (partial(Recurrent, proj_size=5), SHORT, [{"r": 4, "dropout": 0.5, "bias": "all"}]),
    (
        partial(Recurrent, nn.GRU),
        SHORT,
        [{"target_slices": {"rnn": ["hh_l0", "ih_l0"]}, "use_rslora": True}],
    ),
    (partial(Recurrent, nn.RNN), SHORT, [{"r": 30, "alpha": 7, "init": "pissa"}]),
]


def cases() -> list[tuple[Callable[[], nn.Module], Tensor, dict[str, Any]]]:
    """Each model with each of its configurations."""
    found = []
    for make, inputs, configs in MODELS:
        for config in configs:
            found.append((make, inputs, config))
    return found


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("make", "inputs", "config"), cases())
def test_outputs_in_peft_are_those_here(
    make: Any, inputs: Tensor, config: dict[str, Any], tmp_path: Path
) -> None:
    how = LoRAConfig(**{"r": 2, "target_modules": "all", **config})
    check_read(make(), how, lambda model: model(inputs), tmp_path)


def quantised(bits: int) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    if bits == 4:
        return bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    return bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)


@pytest.mark.parametrize(("bits", "r", "ranks"), [(4, 100, None), (8, 2, {"1": 3})])
@torch.no_grad()
def test_quantised_layers(
    bits: int, r: int, ranks: dict[str, int] | None, tmp_path: Path
) -> None:
    layers = [nn.Embedding(WORDS, 64), quantised(bits), nn.Linear(64, 3)]
    base = nn.Sequential(*layers).to("cpu")  # which quantises it
    config = LoRAConfig(r=r, alpha=r, target_modules="all", rank_pattern=ranks)
    model = trained(base, config)
    save_adapter(model, tmp_path / "adapter.safetensors")
    export_peft(model, tmp_path / "of the model")
    export_peft(tmp_path / "adapter.safetensors", tmp_path / "of the file")
    expected = model.train()(INDEX)
    check_equal(read(base, tmp_path / "of the model").train()(INDEX), expected)
    check_equal(read(base, tmp_path / "of the file").train()(INDEX), expected)


def test_half_precision(tmp_path: Path) -> None:
    """Differences of factors that started from the weight are taken in float32."""
    config = LoRAConfig(
        r=2, target_modules=["linear"], init="pissa", autocast_adapter_dtype=False
    )
    model = trained(Mixed().bfloat16(), config, scale=0.01)
    export_peft(model, tmp_path / "peft")
    b, a = load_file(tmp_path / "peft" / "adapter_model.safetensors").values()
    assert a.dtype is torch.float32
    assert b.dtype is torch.float32
    a, b = sorted((a.double(), b.double()), key=len)
    state = {name: value.double() for name, value in adapter_state_dict(model).items()}
    now = state["linear.lora_B"] @ state["linear.lora_A"]
    start = state["linear.lora_B0"] @ state["linear.lora_A0"]
    check_equal(b @ a, now - start)


def exported_config(source: Any, folder: Path, **how: Any) -> dict[str, Any]:
    """What is written of a configuration."""
    export_peft(source, folder, **how)
    return json.loads((folder / "adapter_config.json").read_text())


def test_a_slice_that_is_named_after_a_bias_is_no_bias(tmp_path: Path) -> None:
    slices = {"q": {"bias_rows": (0, 4)}}
    config = LoRAConfig(r=2, target_modules=["q"], target_slices=slices, bias="all")
    export_peft(trained(nn.ModuleDict({"q": nn.Linear(4, 8)}), config), tmp_path)
    in_layer = {
        name.removeprefix("base_model.model.q.")
        for name in load_file(tmp_path / "adapter_model.safetensors")
    }
    assert in_layer == {"lora_A.weight", "lora_B.weight", "base_layer.bias"}


def test_names_are_exact(tmp_path: Path) -> None:
    """A list is shorter, but "q" would also mean "inner.q"."""
    inner = nn.ModuleDict({"q": nn.Linear(4, 4)})
    base = nn.ModuleDict({"q": nn.Linear(4, 4), "inner": inner})
    model = trained(base, LoRAConfig(r=2, target_modules="q"))
    save_adapter(model, tmp_path / "a.safetensors")
    assert exported_config(model, tmp_path / "peft")["target_modules"] == "q"
    assert (
        exported_config(tmp_path / "a.safetensors", tmp_path / "peft")["target_modules"]
        == "q"
    )


@pytest.mark.parametrize("name", ["embed", "lm_head"])
@torch.no_grad()
def test_a_tied_weight_is_adapted_in_one_use_and_named(
    name: str, tmp_path: Path
) -> None:
    """PEFT's own merge changes both."""
    base = TinyLM().eval()
    model = trained(base, LoRAConfig(r=2, target_modules=[name, "q_proj"]))
    save_adapter(model, tmp_path / "adapter.safetensors")
    message = rf"weights of '{name}' are also .* merge_and_unload\(\).* save_merged"
    with pytest.warns(LoRAWarning, match=message):
        export_peft(model, tmp_path / "peft")
    with pytest.warns(LoRAWarning, match=message):
        export_peft(tmp_path / "adapter.safetensors", tmp_path / "peft")
    check_equal(read(base, tmp_path / "peft")(INDEX), model(INDEX))
    merged = read(base, tmp_path / "peft", merged=True)(INDEX)
    assert (merged - model(INDEX)).norm() > 0.03 * merged.norm()


@torch.no_grad()
def test_encoder_in_eval_mode_is_named(tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    model = trained(
        base,
        LoRAConfig(r=2, target_modules="all", target_slices={"self_attn": ["q", "v"]}),
    )
    with pytest.warns(
        LoRAWarning, match=r"'layers.0', 'layers.1' are .* merge_and_unload"
    ):
        export_peft(model, tmp_path / "peft")
    x = torch.randn(2, 5, WIDTH)
    check_equal(read(base, tmp_path / "peft", merged=True)(x), model(x))


def doubles(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 2 * output


def test_layers_with_forward_hooks_are_named(tmp_path: Path) -> None:
    """PEFT doubles the output of the layer inside, and adds the update after that."""
    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(doubles)
    base = nn.Sequential(nn.Linear(4, 4), hooked)
    model = trained(base, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "own.safetensors")
    for source in (model, tmp_path / "own.safetensors"):
        with pytest.warns(LoRAWarning, match="^'1' have forward hooks"):
            export_peft(source, tmp_path / "peft")
    x = torch.randn(3, 4)
    here = model(x)
    there = read(base, tmp_path / "peft")
    merged = read(base, tmp_path / "peft", merged=True)
    assert not torch.allclose(there(x), here, atol=1e-3)
    check_equal(merged(x), here)
    with pytest.warns(LoRAWarning, match="^'1' have forward hooks"):
        load_adapter(deepcopy(base), tmp_path / "peft")


def test_uniform_has_one_rank_and_one_alpha(tmp_path: Path) -> None:
    how = LoRAConfig(
        r=2,
        alpha=3,
        use_rslora=True,
        target_modules="all",
        rank_pattern={"linear": 7},
        alpha_pattern={"embed": 9},
    )
    model = trained(Mixed(), how)
    config = exported_config(model, tmp_path / "peft", uniform=True)
    assert config["rank_pattern"] == {}
    assert config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    ranks = {min(value.shape[:2]) for value in tensors.values()}
    assert ranks == {7, 3}  # the head has 3 rows

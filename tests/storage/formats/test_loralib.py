"""loralib's files load into plain models, and give loralib's outputs."""

from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

import lightning_lora as ll
from lightning_lora.model.view import View
from tests.support.models import Around
from tests.support.parameters import add_to
from tests.support.peft_reading import built, gap
from tests.support.storage import refused, saved

INDEX = torch.arange(12).view(2, 6)


class Plain(nn.Module):
    """A layer of each kind that loralib adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.linear = nn.Linear(8, 8)
        self.c_attn = nn.Linear(8, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, index: Tensor) -> Tensor:
        x = torch.tanh(self.linear(self.embed(index)))
        return self.head(torch.tanh(self.c_attn(x)))


class Theirs(Plain):
    """The same, of loralib's layers."""

    def __init__(
        self, enabled: tuple[bool, ...] = (True, False, True), r: int = 2
    ) -> None:
        super().__init__()
        self.embed = loralib.Embedding(12, 8, r=r, lora_alpha=6)
        self.linear = loralib.Linear(8, 8, r=r, lora_alpha=6)
        self.c_attn = loralib.MergedLinear(
            8, 24, r=r, lora_alpha=6, enable_lora=list(enabled)
        )


@torch.no_grad()
def trained(model: nn.Module, base: nn.Module) -> Any:
    """loralib's model on this base, with random factors."""
    model.train()
    model.load_state_dict(base.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


SLICES = {"c_attn": ["q", "v"]}


@pytest.mark.parametrize(
    ("enabled", "slices", "r"),
    [((True, False, True), ["q", "v"], 16), ((False, True, False), ["k"], 2)],
)
def test_outputs_are_those_of_loralib(
    tmp_path: Path, enabled: Any, slices: list[str], r: int
) -> None:
    theirs = trained(Theirs(enabled, r), built(Plain))
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "a.bin")
    loaded = built(Plain)
    around = Around(built(Plain)).eval()
    for model in (loaded, around):
        ll.load_adapter(
            model, tmp_path / "a.bin", alpha=6, target_slices={"c_attn": slices}
        )
        assert gap(model(INDEX), theirs(INDEX)) < 1e-5


def as_it_is(held: dict[str, Tensor]) -> dict[str, Any]:
    return held


def wrapped(held: dict[str, Tensor]) -> dict[str, Any]:
    """As training loops write a model inside DistributedDataParallel."""
    return {
        "model_state_dict": {f"module.{name}": value for name, value in held.items()}
    }


@pytest.mark.parametrize("write", [as_it_is, wrapped])
@pytest.mark.parametrize(("bias", "added"), [("none", 0), ("lora_only", 1)])
def test_biases_and_heads_come_along_from_code_that_wraps_them_too(
    tmp_path: Path, bias: str, added: int, write: Any
) -> None:
    theirs = trained(Theirs(), built(Plain))
    add_to(theirs.head.weight, 1)
    add_to(theirs.head.bias, 1)
    add_to(theirs.linear.bias, added)
    held = loralib.lora_state_dict(theirs, bias=bias)
    held["head.weight"] = theirs.head.weight.data
    held["head.bias"] = theirs.head.bias.data
    torch.save(write(held), tmp_path / "a.pt")
    model = built(Plain)
    ll.load_adapter(model, tmp_path / "a.pt", alpha=6, target_slices=SLICES)
    assert gap(model(INDEX), theirs(INDEX)) < 1e-5
    config = View(model).config
    assert config.modules_to_save == ("head",)
    assert config.bias == bias


def test_gpt2_as_loralibs_own_code_has_it(tmp_path: Path) -> None:
    """There, ``c_attn`` is a MergedLinear with the weight (in, out), as transformers' Conv1D."""
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=12, n_positions=8)
    model = built(lambda: GPT2Model(config))
    expected = built(lambda: GPT2Model(config))
    theirs = loralib.MergedLinear(
        8, 24, r=2, lora_alpha=4, enable_lora=[True, False, True], fan_in_fan_out=True
    )
    expected.h[0].attn.c_attn = trained(theirs, expected.h[0].attn.c_attn)
    held = loralib.lora_state_dict(expected)
    torch.save(
        {f"transformer.{name}": value for name, value in held.items()},
        tmp_path / "a.pt",
    )
    around = nn.ModuleDict({"transformer": model})
    ll.load_adapter(around, tmp_path / "a.pt", alpha=4, target_slices=SLICES)
    assert gap(model(INDEX), expected(INDEX)) < 1e-5


@pytest.mark.parametrize("name", ["a.safetensors", "peft"])
def test_alpha_of_other_files_is_in_them(tmp_path: Path, name: str) -> None:
    model = saved(tmp_path / "a.safetensors", built(Plain))
    ll.export_peft(model, tmp_path / "peft")
    fresh = built(Plain)
    with refused(fresh, ll.ConfigError, r"are for files of loralib.*Leave them out"):
        ll.load_adapter(fresh, tmp_path / name, alpha=16)


SAID: dict[str, Any] = {"alpha": 6, "target_slices": SLICES}
CASES: list[tuple[dict[str, Tensor], dict[str, Any], type[Exception], str]] = [
    (
        {},
        {"alpha": None},
        ll.ConfigError,
        r"is in no file: load_adapter.*inject_adapters",
    ),
    (
        {},
        {"target_slices": None},
        ll.AdapterMismatchError,
        r"MergedLinear.*enable_lora.*'c_attn'",
    ),
    (
        {},
        {"target_slices": {"c_attn": ["q", "k", "v"]}},
        ll.AdapterMismatchError,
        "2 slices.*name 3",
    ),
    ({}, {"target_slices": {**SLICES, "c_proj": ["q"]}}, ll.TargetError, "c_proj"),
    (
        {"linear.lora_A": torch.ones(2, 8, 1)},
        {},
        ll.AdapterMismatchError,
        "MergedLinear and Embedding",
    ),
    ({"linear.weight": torch.ones(8, 8)}, {}, ll.BaseMismatchError, "'linear.weight'"),
]


@pytest.mark.parametrize(("change", "arguments", "error", "match"), CASES)
def test_what_does_not_fit(
    tmp_path: Path, change: Any, arguments: Any, error: type[Exception], match: str
) -> None:
    theirs = trained(Theirs(), built(Plain))
    torch.save({**loralib.lora_state_dict(theirs), **change}, tmp_path / "a.bin")
    model = built(Plain)
    with refused(model, error, match):
        ll.load_adapter(model, tmp_path / "a.bin", **{**SAID, **arguments})

"""A slice adapts its own rows and no others."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_lora as ll
from tests.support.models import randomise, same, state

Rows = dict[str, list[int]]


class Fused(nn.Module):
    """An attention's projection as GPT-2 has it, and one that shares keys and values as Phi-3's does."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.qkv_proj, self.other = Conv1D(24, 8), nn.Linear(8, 16), nn.Linear(8, 6)
        self.config: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.c_attn(x), self.qkv_proj(x), self.other(x)], dim=-1)


def fused() -> Fused:
    torch.manual_seed(0)
    return Fused()


def changed(output: Tensor, before: Tensor) -> list[int]:
    return (output != before).any(dim=0).nonzero().flatten().tolist()


def test_slices_of_fused_projections_are_adapted_alone(tmp_path: Path) -> None:
    base, model, x = fused(), fused(), torch.randn(3, 8)
    slices = {"c_attn": ["v", "q"], "other": {"first": [1, 3]}}
    how = ll.LoRAConfig(r=2, alpha=2, target_modules=["c_attn", "other"], target_slices=slices)
    ll.inject_adapters(model, how)
    assert torch.equal(model(x), base(x))
    assert [n for n in model.state_dict() if "lora_B" in n] == [
        "c_attn.lora_B_q", "c_attn.lora_B_v", "other.lora_B_first",
    ]  # fmt: skip
    randomise(model)
    output = model(x)
    assert changed(output, base(x)) == [*range(8), *range(16, 24), 41, 42]
    update = model.c_attn.lora_B_v @ model.c_attn.lora_A_v
    torch.testing.assert_close(output[:, 16:24], base(x)[:, 16:24] + x @ update.T)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    rest = torch.ones(24, dtype=torch.bool)
    rest[:8], rest[16:] = False, False
    assert torch.equal(model.c_attn.weight[:, rest], base.c_attn.weight[:, rest])
    ll.unmerge_adapters(model)
    output.sum().backward()
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(base, tmp_path / "a.safetensors")
    assert torch.equal(base(x), output)


def test_slices_choose_among_the_parts_of_a_layer_and_drop_the_rest() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    names = ll.inject_adapters(
        model, ll.LoRAConfig(r=2, target_modules=["self_attn"], target_slices={"self_attn": ["q", "v"]})
    )
    assert names == ("self_attn",)
    assert list(ll.adapter_state_dict(model)) == [f"self_attn.lora_{f}_{p}" for p in "qv" for f in "AB"]
    with pytest.raises(ll.AdapterMismatchError, match="matrices="):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["self_attn"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_slices": {"c_attn": ["z"]}}, "'c_attn' has no parts 'z'. It has 'q', 'k', 'v'"),
        ({"target_slices": {"other": ["q"]}}, r"The rows of 'q' in 'other', .* are not known.*\[first, end\]"),
        ({"target_slices": {"qkv_proj": ["q"]}}, "The rows of 'q' in 'qkv_proj'"),
        ({"target_slices": {"attn": ["q"]}}, r"target_slices \['attn'\] match no module.*c_attn"),
        ({"target_slices": {"c_attn": ["q"]}, "use_dora": True}, "without target_slices"),
        ({"target_slices": {"c_attn": ["q"], "net.c_attn": ["v"]}}, "match no module"),
        ({"target_slices": {"c_att.": ["q"], "c_attn": ["v"]}}, "'c_attn' has no effect on.*Put it first"),
    ],
    ids=str,
)
def test_slices_that_mean_nothing_are_refused(arguments: dict[str, Any], words: str) -> None:
    model = fused()
    before = state(model)
    with pytest.raises(ll.TargetError, match=words):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["c_attn", "qkv_proj", "other"], **arguments))
    assert same(state(model), before)


class Attention(nn.Module):
    """Holds a fused projection of eight features, as attentions of many models do."""

    def __init__(self, name: str, writes: int, config: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(8, writes))
        if config is not None:
            self.config = SimpleNamespace(**config)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


class CodeGenAttention(Attention):
    """One that computes queries, keys and values in another order, under a name of those that do not."""


class Block(nn.Sequential):
    """A module around one, with or without a configuration of its own."""

    def __init__(self, inner: nn.Module, config: dict[str, Any] | None = None) -> None:
        super().__init__(inner)
        if config is not None:
            self.config = SimpleNamespace(**config)


def rows_of(model: nn.Module, name: str, parts: list[str] | Rows) -> list[int]:
    """The features that change if only these parts of the projection are adapted."""
    x = torch.linspace(-1, 1, 24).view(3, 8)
    before = model(x)
    ll.inject_adapters(model, ll.LoRAConfig(r=1, target_modules=[name], target_slices={name: parts}))
    randomise(model)
    return changed(model(x), before)


def test_slices_change_their_rows_alone_and_share_none() -> None:
    assert rows_of(Block(Attention("proj", 6)), "proj", {"a": [3, 5], "b": [1, 3]}) == [1, 2, 3, 4]
    assert rows_of(Block(Attention("proj", 6)), "proj", {"end": [4, 6], "start": [0, 1]}) == [0, 4, 5]
    for rows in ({"a": [3, 5], "b": [1, 4]}, {"a": [0, 6], "b": [2, 3]}):
        with pytest.raises(ll.ConfigError, match="parts that share rows"):
            ll.LoRAConfig(target_slices={"proj": rows})


def test_a_slice_of_one_row_too_many_is_refused_and_changes_nothing() -> None:
    model = Block(Attention("proj", 6))
    with pytest.raises(ll.TargetError, match=r"'0\.proj' end beyond its 6 rows: 'b'"):
        rows_of(model, "proj", {"a": [0, 2], "b": [2, 7]})
    assert type(model[0].proj) is nn.Linear


# Rows of q, k and v in a fused projection


HEADS = {"num_attention_heads": 4}
KNOWN: list[tuple[str, int, dict[str, Any] | None, dict[str, range]]] = [
    ("c_attn", 24, None, {"q": range(8), "k": range(8, 16), "v": range(16, 24)}),
    *((name, 24, None, {"v": range(16, 24)}) for name in ("qkv", "qkv_proj", "Wqkv")),
    ("gate_up_proj", 12, None, {"gate": range(6), "up": range(6, 12)}),
    ("qkv", 24, {"hidden_size": 8}, {"v": range(16, 24)}),
    ("qkv", 24, HEADS | {"num_key_value_heads": None, "head_dim": None}, {"k": range(8, 16)}),
    ("qkv", 16, HEADS | {"num_key_value_heads": 2}, {"q": range(8), "k": range(8, 12), "v": range(12, 16)}),
    ("qkv", 32, HEADS | {"num_key_value_heads": 2, "head_dim": 4}, {"k": range(16, 24), "v": range(24, 32)}),
    ("qkv", 48, HEADS | {"head_dim": 4}, {"q": range(16), "k": range(16, 32), "v": range(32, 48)}),
    ("c_attn", 12, HEADS | {"multi_query": True}, {"q": range(8), "k": range(8, 10), "v": range(10, 12)}),
]


@pytest.mark.parametrize(("name", "writes", "config", "parts"), KNOWN, ids=str)
def test_parts_are_where_the_name_and_the_numbers_of_heads_say(
    name: str, writes: int, config: dict[str, Any] | None, parts: dict[str, range]
) -> None:
    for part, where in parts.items():
        assert rows_of(Block(Attention(name, writes, config)), name, [part]) == list(where)


UNKNOWN: dict[str, nn.Module] = {
    "an odd number of features": Block(Attention("gate_up_proj", 13)),
    "other sizes": Block(Attention("qkv", 25)),
    "fewer features than these heads write": Block(Attention("qkv", 16, HEADS)),
    "more features than these heads write": Block(Attention("qkv", 24, HEADS | {"num_key_value_heads": 2})),
    "written head by head": Block(Attention("c_attn", 24, HEADS | {"multi_query": False})),
    "in another order": Block(CodeGenAttention("qkv_proj", 24)),
    "another name": Block(Attention("query_key_value", 24)),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_parts_that_are_not_known_are_not_guessed(case: str) -> None:
    name = next(name for name, module in UNKNOWN[case].named_modules() if type(module) is nn.Linear)
    part = "gate" if "gate" in name else "q"
    with pytest.raises(ll.TargetError, match=rf"The rows of '{part}' in '{name}', which has \d+, are not known"):
        ll.inject_adapters(UNKNOWN[case], ll.LoRAConfig(r=1, target_modules=[name], target_slices={name: [part]}))


def test_the_nearest_configuration_with_heads_counts() -> None:
    shares, alone = HEADS | {"num_key_value_heads": 2}, HEADS
    near = Block(Block(Attention("qkv", 16, shares), alone), alone)
    assert rows_of(near, "qkv", ["k"]) == list(range(8, 12))
    between = Block(Block(Attention("qkv", 16, {"hidden_size": 8}), shares), alone)
    assert rows_of(between, "qkv", ["k"]) == list(range(8, 12))

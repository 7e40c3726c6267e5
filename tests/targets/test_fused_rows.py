"""Parts of a fused projection lie where heads say."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, TargetError, inject_adapters
from tests.support.models import randomise


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


def rows(model: nn.Module, name: str, part: str) -> list[int]:
    """The features that change if only this part of the projection is adapted."""
    x = torch.linspace(-1, 1, 24).view(3, 8)
    before = model(x)
    inject_adapters(model, LoRAConfig(r=1, target_modules=[name], target_slices={name: [part]}))
    randomise(model)
    return (model(x) != before).any(dim=0).nonzero().flatten().tolist()


HEADS = {"num_attention_heads": 4}
KNOWN: list[tuple[str, int, dict[str, Any] | None, dict[str, range]]] = [
    *((name, 24, None, {"q": range(8), "k": range(8, 16), "v": range(16, 24)}) for name in ("c_attn", "qkv")),
    *((name, 24, None, {"q": range(8), "k": range(8, 16), "v": range(16, 24)}) for name in ("qkv_proj", "Wqkv")),
    ("gate_up_proj", 12, None, {"gate": range(6), "up": range(6, 12)}),
    ("qkv", 24, {"hidden_size": 8}, {"v": range(16, 24)}),
    ("qkv", 24, HEADS, {"q": range(8), "k": range(8, 16), "v": range(16, 24)}),
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
        assert rows(Block(Attention(name, writes, config)), name, part) == list(where)


UNKNOWN: dict[str, nn.Module] = {
    "an odd number of features": Block(Attention("gate_up_proj", 13)),
    "other sizes": Block(Attention("qkv", 25)),
    "fewer features than these heads write": Block(Attention("qkv", 16, HEADS)),
    "more features than these heads write": Block(Attention("qkv", 24, HEADS | {"num_key_value_heads": 2})),
    "written head by head": Block(Attention("c_attn", 24, HEADS | {"multi_query": False})),
    "in another order": Block(CodeGenAttention("qkv_proj", 24)),
    "in another order, further out": Block(CodeGenAttention("inner", 8), None),
    "another name": Block(Attention("query_key_value", 24)),
}
UNKNOWN["in another order, further out"][0].inner = Attention("qkv_proj", 24)


@pytest.mark.parametrize("case", UNKNOWN)
def test_parts_that_are_not_known_are_not_guessed(case: str) -> None:
    name = next(name for name, module in UNKNOWN[case].named_modules() if type(module) is nn.Linear)
    part = "gate" if "gate" in name else "q"
    with pytest.raises(TargetError, match=rf"The rows of '{part}' in '{name}', which has \d+, are not known"):
        inject_adapters(UNKNOWN[case], LoRAConfig(r=1, target_modules=[name], target_slices={name: [part]}))


def test_the_nearest_configuration_with_heads_counts() -> None:
    shares, alone = HEADS | {"num_key_value_heads": 2}, HEADS
    near = Block(Block(Attention("qkv", 16, shares), alone), alone)
    assert rows(near, "qkv", "k") == list(range(8, 12))
    between = Block(Block(Attention("qkv", 16, {"hidden_size": 8}), shares), alone)
    assert rows(between, "qkv", "k") == list(range(8, 12))
    far = Block(Block(Attention("qkv", 16), {"hidden_size": 8}), shares)
    assert rows(far, "qkv", "k") == list(range(8, 12))

"""A slice adapts its own rows and no others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_lora as ll
from tests.support.faults import unchanged
from tests.support.models import randomise

REFUSED: list[tuple[dict[str, Any], type[ll.LoRAError], str]] = [
    (
        {"target_slices": {"c_attn": ["z"]}},
        ll.TargetError,
        "'c_attn' has no parts 'z'. It has 'q', 'k', 'v'",
    ),
    (
        {"target_slices": {"other": ["q"]}},
        ll.TargetError,
        r"The rows of 'q' in 'other', .* are not known.*\[first, en",
    ),
    (
        {"target_slices": {"attn": ["q"]}},
        ll.TargetError,
        r"target_slices \['attn'\] match no module.*c_attn",
    ),
    (
        {"target_slices": {"c_attn": ["q"]}, "use_dora": True},
        ll.TargetError,
        "without target_slices",
    ),
    (
        {"target_slices": {"c_att.": ["q"], "c_attn": ["v"]}},
        ll.TargetError,
        "'c_attn' has no effect on.*Put it first",
    ),
    (
        {"target_slices": {"other": {"a": [0, 2], "b": [2, 7]}}},
        ll.TargetError,
        "'other' end beyond its 6 rows: 'b'",
    ),
    (
        {"target_slices": {"other": {"a": [3, 5], "b": [1, 4]}}},
        ll.ConfigError,
        "parts that share rows",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "match"), REFUSED, ids=str)
def test_slices_that_mean_nothing_are_refused(
    arguments: dict[str, Any], error: Any, match: str
) -> None:
    model = nn.ModuleDict(
        {
            "c_attn": Conv1D(24, 8),
            "qkv_proj": nn.Linear(8, 16),
            "other": nn.Linear(8, 6),
        }
    )
    with unchanged(model), pytest.raises(error, match=match):
        ll.inject_adapters(
            model,
            ll.LoRAConfig(
                r=2, target_modules=["c_attn", "qkv_proj", "other"], **arguments
            ),
        )


# Rows of q, k and v in a fused projection


class Attention(nn.Module):
    """Holds a fused projection of eight features, as attentions of many models do."""

    def __init__(
        self, name: str, writes: int, config: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(8, writes))
        if config is not None:
            self.config = SimpleNamespace(**config)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


class Block(nn.Sequential):
    """A module around one, with or without a configuration of its own."""

    def __init__(self, inner: nn.Module, config: dict[str, Any] | None = None) -> None:
        super().__init__(inner)
        if config is not None:
            self.config = SimpleNamespace(**config)


def rows_of(model: nn.Module, name: str, part: str) -> list[int]:
    """The features that change if only this part of the projection is adapted."""
    x = torch.linspace(-1, 1, 24).view(3, 8)
    before = model(x)
    ll.inject_adapters(
        model, ll.LoRAConfig(r=1, target_modules=[name], target_slices={name: [part]})
    )
    randomise(model)
    return (model(x) != before).any(dim=0).nonzero().flatten().tolist()


HEADS = {"num_attention_heads": 4}
GROUPS = HEADS | {"num_key_value_heads": 2}
KNOWN: list[tuple[str, int, dict[str, Any] | None, dict[str, range]]] = [
    ("c_attn", 24, None, {"q": range(8), "k": range(8, 16), "v": range(16, 24)}),
    *((name, 24, None, {"v": range(16, 24)}) for name in ("qkv", "qkv_proj", "Wqkv")),
    ("gate_up_proj", 12, None, {"gate": range(6), "up": range(6, 12)}),
    ("qkv", 24, {"hidden_size": 8}, {"v": range(16, 24)}),
    (
        "qkv",
        24,
        HEADS | {"num_key_value_heads": None, "head_dim": None},
        {"k": range(8, 16)},
    ),
    ("qkv", 32, GROUPS | {"head_dim": 4}, {"k": range(16, 24), "v": range(24, 32)}),
    (
        "c_attn",
        12,
        HEADS | {"multi_query": True},
        {"q": range(8), "k": range(8, 10), "v": range(10, 12)},
    ),
]


@pytest.mark.parametrize(("name", "writes", "config", "parts"), KNOWN, ids=str)
def test_parts_are_where_the_name_and_the_numbers_of_heads_say(
    name: str, writes: int, config: dict[str, Any] | None, parts: dict[str, range]
) -> None:
    for part, where in parts.items():
        assert rows_of(Block(Attention(name, writes, config)), name, part) == list(
            where
        )


UNKNOWN: dict[str, tuple[Attention, str]] = {
    "an odd number of features": (Attention("gate_up_proj", 13), "gate"),
    "other sizes": (Attention("qkv", 25), "q"),
    "other sizes than these heads write": (Attention("qkv", 24, GROUPS), "q"),
    "written head by head": (
        Attention("c_attn", 24, HEADS | {"multi_query": False}),
        "q",
    ),
    "in another order": (
        type("CodeGenAttention", (Attention,), {})("qkv_proj", 24),
        "q",
    ),
    "another name": (Attention("query_key_value", 24), "q"),
}


@pytest.mark.parametrize(("attention", "part"), UNKNOWN.values(), ids=UNKNOWN)
def test_parts_that_are_not_known_are_not_guessed(
    attention: Attention, part: str
) -> None:
    with pytest.raises(
        ll.TargetError,
        match=rf"The rows of '{part}' in '0.{attention.name}', .* are not known",
    ):
        rows_of(Block(attention), attention.name, part)


@pytest.mark.parametrize("own", [GROUPS, {"hidden_size": 8}])
def test_the_nearest_configuration_with_heads_counts(own: dict[str, Any]) -> None:
    around = GROUPS if own is not GROUPS else HEADS
    model = Block(Block(Attention("qkv", 16, own), around), HEADS)
    assert rows_of(model, "qkv", "k") == list(range(8, 12))

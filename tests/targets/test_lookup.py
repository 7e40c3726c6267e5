"""A mistake is named with its nearest names, and with what to write instead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetError, inject_adapters
from tests.support.faults import unchanged
from tests.support.models import LitTiny, is_plain
from tests.support.targets import Table, adapted


class Sensor(nn.Module):
    """A model of layers that are not linear, and of a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.scale = nn.Conv2d(3, 4, 3), nn.LSTM(4, 4), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Any) -> Any:
        return self.lstm(self.conv(x).flatten(2).mT)


class Mixed(Table):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.norm, self.proj = nn.Parameter(torch.zeros(5)), nn.LayerNorm(5), nn.Linear(5, 5)


def sensor() -> nn.Module:
    return nn.Sequential(Sensor())


def net(**modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleDict(modules)


QUERIES = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(2, 2)}) for _ in range(2))
BODY, NORMED = net(body=nn.Linear(4, 4)), net(norm=nn.LayerNorm(4), body=nn.Linear(4, 4))
WORDS = net(norm=nn.LayerNorm(4), words=nn.Embedding(4, 4), more=nn.Embedding(4, 4))
MIXED = net(mixed=Mixed())
QUERY = net(query_norm=nn.LayerNorm(4), query_proj=nn.Linear(4, 4))
MISTAKES: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (LitTiny, {"target_modules": ["q_porj"]}, r"\['q_porj'\] match no module of LitTiny. Nearest names: 'q_proj'"),
    (LitTiny, {"target_modules": ["q_proj", "nowhere"]}, r"target_modules \['nowhere'\]"),
    (LitTiny, {"target_modules": ["xyz"]}, r"that can be adapted end in 'embed', 'q_proj', 'v_proj', 'head'"),
    (LitTiny, {"target_modules": "q_pr"}, r"Nearest names: 'q_proj'"),
    (LitTiny, {"exclude_modules": ["haed"]}, r"exclude_modules \['haed'\] .*'head'"),
    (LitTiny, {"modules_to_save": ["classifier"]}, r"modules_to_save \['classifier'\]"),
    (LitTiny, {"rank_pattern": {"k_proj": 2}}, r"rank_pattern \['k_proj'\] .*_proj"),
    (LitTiny, {"alpha_pattern": {"embed": 2.0}}, r"alpha_pattern \['embed'\]"),
    (LitTiny, {"target_modules": ["embed"], "exclude_modules": ["embed"]}, "select no layer of LitTiny"),
    (LitTiny, {"target_modules": ["head"], "modules_to_save": ["head"]}, "select no layer of LitTiny"),
    (sensor, {"target_modules": "conv"}, r"is an expression.*give a list: target_modules=\['conv'\]"),
    (sensor, {}, r'would adapt 2 layers: 1 Conv2d \(.0.conv.\), 1 LSTM \(.0.lstm.\)\. Set target_modules="all"'),
    (sensor, {"target_modules": ["scale"]}, r"'0\.scale' is a parameter: name it in target_parameters"),
    (sensor, {"target_parameters": ["conv"]}, r"match no parameter.*Name parameters, such as '0\.conv\.weight'"),
    (sensor, {"target_modules": ["conv"], "rank_pattern": {"lstm": 1}}, r"\['lstm'\] match layers.*not adapted"),
    (sensor, {"target_modules": ["0"]}, r"a Sensor is not supported .*'0.conv', '0.lstm'\), but.* '0\.scale'"),
    # each near name once, and only if it can be adapted
    (
        lambda: QUERIES,
        {"target_modules": ["qurey"]},
        r"Nearest names: 'query' \(2 of them, such as '0.query'\)\. Correct",
    ),
    (QUERY, {"target_modules": ["query_nrom"]}, r"Nearest names: 'query_proj'\. Correct"),
    (NORMED, {"target_modules": "no.*"}, "'norm': a LayerNorm is not supported"),
    # "all" is offered to those who asked for all linear layers
    (WORDS, {}, r'2 Embedding \(.words. and 1 more\)\. Set target_modules="all"'),
    (
        WORDS,
        {"target_modules": ["words"], "exclude_modules": ["words"]},
        r"^((?!\"all\").)*Correct target_modules((?!\"all\").)*$",
    ),
    # words mean something in target_modules alone
    (BODY, {"target_modules": ["all_linear"]}, "Or did you mean the word 'all-linear'"),
    (BODY, {"exclude_modules": ["all_linear"]}, r"^((?!the word).)*$"),
    # only matrices and layers are offered instead of a module
    (MIXED, {"target_modules": ["mixed"]}, r"it are: 'mixed\.proj'\), but .* its 'mixed\.table', 'mixed\.codes'\)"),
]


@pytest.mark.parametrize(("build", "config", "message"), MISTAKES, ids=str)
def test_mistake_is_named_and_changes_nothing(
    build: Callable[[], nn.Module], config: dict[str, Any], message: str
) -> None:
    with unchanged(model := build()), pytest.raises(TargetError, match=message):
        adapted(model, **config)
    assert is_plain(model)


def test_projection_inside_an_attention_is_named_by_its_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(TargetError, match=r"name 'self_attn', with target_slices={'self_attn': \['out'\]}"):
        inject_adapters(model, LoRAConfig(r=1, target_modules=["out_proj"]))
    assert inject_adapters(model, LoRAConfig(r=1)) == ("self_attn", "linear1", "linear2")

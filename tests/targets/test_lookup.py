"""A mistake is named with its nearest names."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, TargetError, inject_adapters
from lightning_lora.layers import LoRALayer
from tests.support.models import LitTiny, same, state
from tests.support.targets import Table, adapted

MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"target_modules": ["q_porj"]},
        r"target_modules \['q_porj'\] match no module of LitTiny. Nearest names: 'q_proj'",
    ),
    ({"target_modules": ["q_proj", "nowhere"]}, r"target_modules \['nowhere'\]"),
    ({"target_modules": ["xyz"]}, r"Layers that can be adapted end in 'embed', 'q_proj', 'v_proj', 'head'"),
    ({"target_modules": "q_pr"}, r"Nearest names: 'q_proj'"),
    ({"exclude_modules": ["haed"]}, r"exclude_modules \['haed'\] .*'head'"),
    ({"modules_to_save": ["classifier"]}, r"modules_to_save \['classifier'\]"),
    ({"rank_pattern": {"k_proj": 2}}, r"rank_pattern \['k_proj'\] .*_proj"),
    ({"alpha_pattern": {"embed": 2.0}}, r"alpha_pattern \['embed'\]"),
    ({"target_modules": ["embed"], "exclude_modules": ["embed"]}, "select no layer of LitTiny"),
    ({"target_modules": ["head"], "modules_to_save": ["head"]}, "select no layer of LitTiny"),
]


@pytest.mark.parametrize(("config", "message"), MISTAKES, ids=str)
def test_mistake_is_named_and_changes_nothing(config: dict[str, Any], message: str) -> None:
    model = LitTiny()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(TargetError, match=message):
        adapted(model, **config)
    assert same(state(model), before) and flags == [p.requires_grad for p in model.parameters()]
    assert not any(isinstance(module, LoRALayer) for module in model.modules())


def test_each_near_name_is_hinted_at_once() -> None:
    model = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(2, 2)}) for _ in range(2))
    with pytest.raises(TargetError, match=r"Nearest names: 'query' \(2 of them, such as '0.query'\)\. Correct"):
        adapted(model, target_modules=["qurey"])


HINTS: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": "conv"}, r"is an expression.*give a list: target_modules=\['conv'\]"),
    ({}, r'"all" would adapt 2 layers: 1 Conv2d \(.0.conv.\), 1 LSTM \(.0.lstm.\)\. Set target_modules="all"'),
    ({"target_modules": ["scale"]}, r"'0\.scale' is a parameter: name it in target_parameters"),
    ({"target_parameters": ["conv"]}, r"match no parameter.*Name parameters, such as '0\.conv\.weight'"),
    ({"target_modules": ["conv"], "rank_pattern": {"lstm": 1}}, r"\['lstm'\] match layers.*not adapted"),
    (
        {"target_modules": ["0"]},
        r"a Sensor is not supported .*'0.conv', '0.lstm'\), but.* '0\.scale'",
    ),
]


class Sensor(nn.Module):
    """A model of layers that are not linear, and of a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.scale = nn.Conv2d(3, 4, 3), nn.LSTM(4, 4), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Any) -> Any:
        return self.lstm(self.conv(x).flatten(2).mT)


@pytest.mark.parametrize(("arguments", "words"), HINTS, ids=str)
def test_refusal_says_what_to_write_instead(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(TargetError, match=words):
        adapted(nn.Sequential(Sensor()), **arguments)


def test_an_expression_that_means_no_layer_is_refused_for_what_it_means() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "body": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="'norm': a LayerNorm is not supported"):
        adapted(model, target_modules="no.*")


def test_all_is_offered_only_to_those_who_asked_for_all_linear_layers() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "words": nn.Embedding(4, 4)})
    with pytest.raises(TargetError, match=r'Embedding \(.words.\)\. Set target_modules="all"'):
        adapted(model)
    with pytest.raises(TargetError, match="Correct target_modules") as refusal:
        adapted(model, target_modules=["words"], exclude_modules=["words"])
    assert '"all"' not in str(refusal.value)


def test_near_names_are_those_of_layers_that_can_be_adapted() -> None:
    model = nn.ModuleDict({"query_norm": nn.LayerNorm(4), "query_proj": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match=r"Nearest names: 'query_proj'\. Correct"):
        adapted(model, target_modules=["query_nrom"])


def test_a_word_that_is_misspelt_is_hinted_at_where_words_mean_something() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="Or did you mean the word 'all-linear'"):
        adapted(model, target_modules=["all_linear"])
    with pytest.raises(TargetError) as refusal:
        adapted(model, exclude_modules=["all_linear"])
    assert "the word" not in str(refusal.value)


def test_only_matrices_and_layers_are_offered_instead_of_a_module() -> None:
    class Mixed(Table):
        def __init__(self) -> None:
            super().__init__()
            self.bias, self.norm, self.proj = nn.Parameter(torch.zeros(5)), nn.LayerNorm(5), nn.Linear(5, 5)

    model = nn.ModuleDict({"mixed": Mixed()})
    with pytest.raises(
        TargetError, match=r"inside it are: 'mixed\.proj'\), but target_parameters can adapt its 'mixed\.table'"
    ) as why:
        adapted(model, target_modules=["mixed"])
    assert "mixed.norm" not in str(why.value) and "mixed.bias" not in str(why.value)


def test_projection_inside_an_attention_is_named_by_its_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(TargetError, match=r"name 'self_attn', with target_slices={'self_attn': \['out'\]}"):
        inject_adapters(model, LoRAConfig(r=1, target_modules=["out_proj"]))
    assert inject_adapters(model, LoRAConfig(r=1)) == ("self_attn", "linear1", "linear2")

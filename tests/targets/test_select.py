"""A configuration selects the layers and parameters it means."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from torch import nn
from torch.nn.utils import parametrizations

import lightning_lora as ll
from lightning_lora.networks import copies
from lightning_lora.targets import adaptable
from tests.support.compared import assert_state
from tests.support.models import LitTiny, TinyLM, state
from tests.targets.test_checks import LETTERS, Table, adapted, letters, net


class Words(nn.Module):
    """A model that says which of its layers turns features into words."""

    def __init__(self) -> None:
        super().__init__()
        self.body = linear()
        self.words = nn.Linear(4, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.words


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def sharing() -> nn.Module:
    """A model with one layer in two places."""
    shared = linear()
    return net(a=nn.Sequential(shared), b=nn.Sequential(shared, linear()))


def sharing_a_table() -> nn.Module:
    model = net(a=Table(), b=Table(), c=linear())
    model["b"].table = model["a"].table
    return model


def deep() -> nn.Module:
    return net(net=net(blocks=nn.ModuleList([net(attn=net(q=linear(), k=linear()))])))


def queries() -> nn.Module:
    return net(query=linear(), query_norm=linear(), my_query=linear())


def normed() -> nn.Module:
    words = parametrizations.weight_norm(nn.Embedding(5, 4))
    return net(
        words=words, body=linear(), normed=parametrizations.spectral_norm(linear())
    )


SELECTED: list[tuple[Callable[[], nn.Module], dict[str, Any], tuple[str, ...]]] = [
    (sharing, {"target_modules": ["b.0"]}, ("a.0",)),
    (sharing, {"exclude_modules": ["b.0"]}, ("b.1",)),
    (sharing, {"modules_to_save": ["b.0.weight"]}, ("b.1",)),
    (sharing_a_table, {"target_modules": [], "target_parameters": ["b.table"]}, ("b",)),
    (deep, {"target_modules": ["0.attn.q"]}, ("net.blocks.0.attn.q",)),
    (queries, {"target_modules": "quer."}, ("query",)),
    (queries, {"target_modules": ["query"]}, ("query",)),
    (letters, {"alpha_pattern": {**LETTERS, "[abc]": 3}}, ("a", "b", "c")),
    # a weight of a layer is updated by one adapter only
    (
        lambda: nn.Sequential(nn.Sequential(linear(), linear())),
        {"target_parameters": ["0.1.weight"]},
        ("0", "0.0"),
    ),
    # what trains whole needs no adapter
    (LitTiny, {"modules_to_save": ["head", "q_proj.weight"]}, ("v_proj",)),
    # no output head of a language model
    (lambda: net(model=Words(), more=linear()), {}, ("model.body", "more")),
    (Words, {"target_modules": "all"}, ("body", "words")),
    (TinyLM, {"target_modules": "all-linear"}, ("q_proj", "v_proj")),
    # nor one that only its name and its size tell, as litgpt's
    (lambda: TinyLM(tied=False), {}, ("q_proj", "v_proj")),
    (
        lambda: net(gpt=TinyLM(tied=False), more=linear()),
        {},
        ("gpt.q_proj", "gpt.v_proj", "more"),
    ),
    (lambda: TinyLM(tied=False), {"target_modules": ["lm_head"]}, ("lm_head",)),
    # it may be a classifier
    (lambda: net(embed=nn.Embedding(20, 8), head=nn.Linear(8, 20)), {}, ("head",)),
    (lambda: net(embed=nn.Embedding(20, 8), lm_head=nn.Linear(8, 5)), {}, ("lm_head",)),
    (
        lambda: net(a=net(e=nn.Embedding(20, 8)), b=net(lm_head=nn.Linear(8, 20))),
        {},
        ("b.lm_head",),
    ),
    (TinyLM, {"target_modules": "all"}, ("embed", "q_proj", "v_proj", "lm_head")),
    (TinyLM, {"target_modules": {"v_proj", "q_proj"}}, ("q_proj", "v_proj")),
    (TinyLM, {"target_modules": r".*(proj|norm)"}, ("q_proj", "v_proj")),
    (normed, {}, ("body",)),
    # a matrix of no numbers has nothing to adapt
    (
        lambda: net(no_words=nn.Embedding(0, 4), cell=nn.GRUCell(0, 4)),
        {"target_modules": "all"},
        ("cell",),
    ),
    # an attention reads the weights inside it
    (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {},
        ("self_attn", "linear1", "linear2"),
    ),
]


@pytest.mark.parametrize(("build", "config", "expected"), SELECTED)
def test_what_is_selected(
    build: Callable[[], nn.Module], config: dict[str, Any], expected: tuple[str, ...]
) -> None:
    model = build()
    before = state(model)
    assert adapted(model, **config) == adapted(model, **config) == expected
    ll.remove_adapters(model)
    # a spectral norm, too, which moves whenever its weight is read
    assert_state(model, before)


def test_a_module_is_looked_at_a_few_times_however_deep_it_lies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net(last=linear())
    looks = Mock(wraps=adaptable.adapter_for)
    for _ in range(12):
        model = net(inner=model)
    monkeypatch.setattr(adaptable, "adapter_for", looks)
    adapted(model, target_modules=["last"])
    assert looks.call_count < 12 * 12 * 3


def test_each_weight_is_sampled_once_where_a_frozen_network_is_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net(
        **{
            half: nn.ModuleList(net(q=linear(), k=linear()) for _ in range(5))
            for half in ("frozen", "free")
        }
    )
    model["frozen"].requires_grad_(False)
    samples = Mock(wraps=copies._Sample)
    monkeypatch.setattr(copies, "_Sample", samples)
    with pytest.warns(ll.LoRAWarning, match="No adapter for 'frozen'"):
        adapted(model)
    assert 0 < samples.call_count <= 20


def test_parameters_of_no_layer_train_if_they_are_named() -> None:
    model = net(body=linear(), a=Table())
    adapted(model, target_modules=["body"], modules_to_save=["a.table"])
    assert [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "lora_" not in name
    ] == ["a.table"]

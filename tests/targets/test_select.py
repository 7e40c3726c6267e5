"""A configuration selects the layers and parameters it means."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lightning_lora as ll
from tests.support.models import LitTiny, TinyLM, data, lora, same, state, trainer
from tests.targets.test_checks import Table, adapted, net


class Words(nn.Module):
    """A model that says which of its layers turns features into words."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.words = linear(), nn.Linear(4, 8)

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


def experts() -> nn.Module:
    return net(body=linear(), a=Table(), head=net(b=Table()))


def normed() -> nn.Module:
    norm = parametrizations.weight_norm
    return net(words=norm(nn.Embedding(5, 4)), body=linear(), normed=norm(linear()))


TABLES: dict[str, Any] = {"target_modules": ["body"], "target_parameters": ["table"]}
SELECTED: list[tuple[Callable[[], nn.Module], dict[str, Any], tuple[str, ...]]] = [
    (sharing, {"target_modules": ["b.0"]}, ("a.0",)),
    (sharing, {"exclude_modules": ["a"]}, ("b.1",)),
    (sharing, {"exclude_modules": ["b.0"]}, ("b.1",)),
    (sharing, {"modules_to_save": ["b.0.weight"]}, ("b.1",)),
    (sharing_a_table, {"target_modules": [], "target_parameters": ["b.table"]}, ("b",)),
    (deep, {"target_modules": ["0.attn.q"]}, ("net.blocks.0.attn.q",)),
    (lambda: net(query=linear(), query_norm=linear(), my_query=linear()), {"target_modules": "quer."}, ("query",)),
    (experts, TABLES | {"exclude_modules": ["head"]}, ("body", "a")),
    (experts, TABLES | {"modules_to_save": ["head"]}, ("body", "a")),
    # a weight of a layer is updated by one adapter only
    (lambda: nn.Sequential(nn.Sequential(linear(), linear())), {"target_parameters": ["0.1.weight"]}, ("0", "0.0")),
    # what trains whole needs no adapter
    (LitTiny, {"modules_to_save": ["head", "q_proj.weight"]}, ("v_proj",)),
    # no output head of a language model
    (lambda: net(model=Words(), more=linear()), {}, ("model.body", "more")),
    (Words, {"target_modules": "all"}, ("body", "words")),
    (TinyLM, {"target_modules": "all-linear"}, ("q_proj", "v_proj")),
    (TinyLM, {"target_modules": "all"}, ("embed", "q_proj", "v_proj", "lm_head")),
    (TinyLM, {"target_modules": {"v_proj", "q_proj"}}, ("q_proj", "v_proj")),
    (TinyLM, {"target_modules": r".*(proj|norm)"}, ("q_proj", "v_proj")),
    (normed, {}, ("body",)),
    # an attention reads the weights inside it
    (lambda: nn.TransformerEncoderLayer(8, 2, 16), {}, ("self_attn", "linear1", "linear2")),
]


@pytest.mark.parametrize(("build", "config", "expected"), SELECTED)
def test_what_is_selected(build: Callable[[], nn.Module], config: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert adapted(model := build(), **config) == adapted(model, **config) == expected


def test_nothing_is_left_of_a_shared_layer_and_parts_of_names_mean_nothing() -> None:
    for build, config in ((sharing, {"modules_to_save": ["b"]}), (deep, {"target_modules": ["locks.0.attn.q"]})):
        with pytest.raises(ll.TargetError):
            adapted(build(), **config)


def test_looking_for_targets_does_not_advance_a_spectral_norm() -> None:
    model = nn.Sequential(linear(), parametrizations.spectral_norm(linear()))
    before = state(model)
    for config in ({"target_modules": "0"}, {"exclude_modules": ["1"]}):
        adapted(model, **config)
        ll.remove_adapters(model)
    assert same(state(model), before)


def test_parameters_of_no_layer_train_if_they_are_named(tmp_path: Path) -> None:
    class Tempered(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, index: Tensor) -> Tensor:
            return super().forward(index) * self.temperature

    model, checkpoint = Tempered(), ModelCheckpoint(tmp_path, "a")
    trainer(tmp_path, [lora(modules_to_save=["head", "temperature"]), checkpoint]).fit(model, data())
    assert model.temperature != 1
    again = ll.load_from_checkpoint(Tempered, tmp_path / "a.ckpt", merge=True)
    assert same(state(again), state(model))
    with pytest.raises(ll.TargetError, match=r"'temprature'.*'temperature'"):
        adapted(Tempered(), modules_to_save=["head", "temprature"])

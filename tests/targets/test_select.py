"""A configuration selects the layers and parameters it means."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.models import LitTiny, TinyLM, data, lora, same, state, trainer
from tests.targets.test_checks import Table, adapted


class Words(nn.Module):
    """A model that says which of its layers turns features into words."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.words = nn.Linear(4, 4), nn.Linear(4, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.words


def net(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


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


TABLES: dict[str, Any] = {"target_parameters": ["table"]}
SELECTED: list[tuple[Callable[[], nn.Module], dict[str, Any], tuple[str, ...]]] = [
    (lambda: net(a=nn.Sequential(linear(), linear()), b=linear()), {"exclude_modules": ["a"]}, ("b",)),
    (sharing, {"target_modules": ["b.0"]}, ("a.0",)),
    (sharing, {"exclude_modules": ["a"]}, ("b.1",)),
    (sharing, {"exclude_modules": ["b.0"]}, ("b.1",)),
    (sharing_a_table, {"target_modules": [], "target_parameters": ["b.table"]}, ("b",)),
    (deep, {"target_modules": ["0.attn.q"]}, ("net.blocks.0.attn.q",)),
    (lambda: net(query=linear(), query_norm=linear(), my_query=linear()), {"target_modules": "quer."}, ("query",)),
    (experts, TABLES | {"exclude_modules": ["head"]}, ("body", "a")),
    (experts, TABLES | {"modules_to_save": ["head"]}, ("body", "a")),
    (LitTiny, {"modules_to_save": ["head"]}, ("q_proj", "v_proj")),
    (Words, {}, ("body",)),
    (lambda: net(model=Words(), more=linear()), {}, ("model.body", "more")),
    (Words, {"target_modules": "all"}, ("body", "words")),
    (TinyLM, {"target_modules": "all-linear"}, ("q_proj", "v_proj")),
    (TinyLM, {"target_modules": "all"}, ("embed", "q_proj", "v_proj", "lm_head")),
    (TinyLM, {"target_modules": {"v_proj", "q_proj"}}, ("q_proj", "v_proj")),
    (TinyLM, {"target_modules": ("embed", "lm_head")}, ("embed", "lm_head")),
    (TinyLM, {"target_modules": r".*(proj|norm)"}, ("q_proj", "v_proj")),
]


@pytest.mark.parametrize(("build", "config", "expected"), SELECTED)
def test_what_is_selected(build: Callable[[], nn.Module], config: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert adapted(model := build(), **config) == adapted(model, **config) == expected


def test_nothing_is_left_of_a_shared_layer_and_parts_of_names_mean_nothing() -> None:
    for build, config in ((sharing, {"modules_to_save": ["b"]}), (deep, {"target_modules": ["locks.0.attn.q"]})):
        with pytest.raises(ll.TargetError):
            adapted(build(), **config)


def test_looking_for_targets_does_not_advance_a_spectral_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)))
    before = state(model)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules="0"))
    ll.remove_adapters(model)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, exclude_modules=["1"]))
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
        ll.inject_adapters(Tempered(), ll.LoRAConfig(r=2, modules_to_save=["head", "temprature"]))
    names = ll.inject_adapters(LitTiny(), ll.LoRAConfig(r=2, modules_to_save=["head", "q_proj.weight"]))
    assert names == ("v_proj",)  # its weight trains whole, and needs no adapter


# One thing under two names


def test_a_weight_that_trains_whole_under_its_layers_other_name_is_not_adapted() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert adapted(model, modules_to_save=["b.weight"]) == ("other",)
    assert model["a"].weight.requires_grad and not model["a"].bias.requires_grad


class Silent(nn.Module):
    """A module that holds a matrix, and never computes."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 5))


class Reads(nn.Module):
    """A module that reads the matrix of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.silent = nn.Linear(4, 4), Silent()

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) @ self.silent.matrix


def test_a_matrix_that_something_else_than_its_holder_reads_is_refused() -> None:
    for model, name in (
        (nn.Sequential(Reads()), "matrix"),
        (nn.ModuleList([nn.ParameterList([torch.ones(4, 4)])]), "0.0"),
    ):
        with pytest.raises(ll.TargetError, match="has no forward of its own, so other code reads it"):
            adapted(model, target_modules=[], target_parameters=[name])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_do_not_make_a_layer_the_head_of_an_embedding() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.ModuleDict({"words": norm(nn.Embedding(5, 4)), "body": nn.Linear(4, 4), "normed": norm(nn.Linear(4, 4))})
    assert adapted(model) == ("body",)

"""Which layers and parameters a configuration means, in models where several names or modules have to do with one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import ConfigError, LoRAConfig, TargetError, adapter_state_dict, inject_adapters
from tests.models import randomise


def adapted(model: nn.Module, **config: Any) -> tuple[str, ...]:
    return inject_adapters(model, LoRAConfig(**{"r": 1, **config}))


class Table(nn.Module):
    """A matrix that a module reads by itself, with parameters that are none beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.grid = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(1, 2, 3, 4))
        self.codes = nn.Parameter(torch.zeros(4, 5, dtype=torch.int32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


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


# One thing under two names


def test_a_weight_that_trains_whole_under_its_layers_other_name_is_not_adapted() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model["b"] = model["a"]
    assert adapted(model, modules_to_save=["b.weight"]) == ("other",)
    assert model["a"].weight.requires_grad and not model["a"].bias.requires_grad


def test_a_parameter_is_found_under_each_of_its_names() -> None:
    def build() -> nn.ModuleDict:
        model = nn.ModuleDict({"a": Table(), "b": Table(), "c": nn.Linear(4, 4)})
        model["b"].table = model["a"].table
        return model

    assert adapted(build(), target_modules=[], target_parameters=["b.table"]) == ("b",)
    model = build()
    adapted(model, modules_to_save=["b.table"])
    assert model["a"].table.requires_grad


def test_a_list_may_name_any_number_of_last_parts() -> None:
    def build() -> nn.ModuleDict:
        inner = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
        return nn.ModuleDict({"net": nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": inner})])})})

    for entry in ("q", "attn.q", "0.attn.q", "blocks.0.attn.q", "net.blocks.0.attn.q"):
        assert adapted(build(), target_modules=[entry]) == ("net.blocks.0.attn.q",)
    with pytest.raises(TargetError, match="match no module"):
        adapted(build(), target_modules=["locks.0.attn.q"])


def test_an_expression_means_whole_names() -> None:
    model = nn.ModuleDict({"query": nn.Linear(4, 4), "query_norm": nn.Linear(4, 4), "my_query": nn.Linear(4, 4)})
    assert adapted(model, target_modules="quer.") == ("query",)


# Parameters


def test_parameters_of_an_excluded_module_are_not_adapted() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "experts": Table(), "head": nn.ModuleDict({"experts": Table()})})
    how: dict[str, Any] = {"target_parameters": ["table"]}
    assert adapted(model, **how, exclude_modules=["head"]) == ("body", "experts")
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "experts": Table(), "head": nn.ModuleDict({"experts": Table()})})
    assert adapted(model, **how, modules_to_save=["head"]) == ("body", "experts")


@pytest.mark.parametrize("name", ["grid", "codes"])
def test_a_parameter_that_is_no_matrix_of_numbers_is_refused(name: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "experts": Table()})
    with pytest.raises(TargetError, match="neither a matrix nor a stack of matrices"):
        adapted(model, target_parameters=[name])


def test_a_matrix_that_something_else_than_its_holder_reads_is_refused() -> None:
    for model, name in (
        (nn.Sequential(Reads()), "matrix"),
        (nn.ModuleList([nn.ParameterList([torch.ones(4, 4)])]), "0.0"),
    ):
        with pytest.raises(TargetError, match="has no forward of its own, so other code reads it"):
            adapted(model, target_modules=[], target_parameters=[name])


def test_a_weight_of_a_layer_is_updated_by_one_adapter_only() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert adapted(model, target_modules="all-linear", target_parameters=["0.1.weight"]) == ("0", "0.0")
    randomise(model)
    assert {name.rpartition("lora_")[0] for name in adapter_state_dict(model)} == {"0.", "0.0."}


# Output heads


class Words(nn.Module):
    """A model that says which of its layers turns features into words."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.words = nn.Linear(4, 4), nn.Linear(4, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.words


def test_a_head_that_the_model_itself_or_one_inside_it_names_is_left_out() -> None:
    assert adapted(Words()) == ("body",)
    assert adapted(nn.ModuleDict({"model": Words(), "more": nn.Linear(4, 4)})) == ("model.body", "more")
    assert adapted(Words(), target_modules="all") == ("body", "words")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_computed_weights_do_not_make_a_layer_the_head_of_an_embedding() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = nn.ModuleDict({"words": norm(nn.Embedding(5, 4)), "body": nn.Linear(4, 4), "normed": norm(nn.Linear(4, 4))})
    with pytest.raises(TargetError, match="'normed': its weight is computed"):
        adapted(model)


# What a refusal says


def test_an_expression_that_means_no_layer_is_refused_for_what_it_means() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "body": nn.Linear(4, 4)})
    with pytest.raises(TargetError, match="'norm': a LayerNorm is not supported"):
        adapted(model, target_modules="no.*")


def test_all_is_offered_only_to_those_who_asked_for_all_linear_layers() -> None:
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "words": nn.Embedding(4, 4)})
    with pytest.raises(TargetError, match=r"Embedding \('words'\)\. Set target_modules='all'"):
        adapted(model)
    with pytest.raises(TargetError, match="Correct target_modules") as refusal:
        adapted(model, target_modules=["words"], exclude_modules=["words"])
    assert "'all'" not in str(refusal.value)


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
        TargetError, match=r"inside it 'mixed\.proj', but with target_parameters its 'mixed\.table'"
    ) as why:
        adapted(model, target_modules=["mixed"])
    assert "mixed.norm" not in str(why.value) and "mixed.bias" not in str(why.value)


def test_a_float8_weight_is_refused_for_what_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(model[1].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        TargetError, match=r"'1': its weight is torch\.float8_e4m3fn, with which torch does not compute"
    ):
        adapted(model, target_modules=["1"])


# Patterns


@pytest.mark.parametrize("argument", ["rank_pattern", "alpha_pattern"])
def test_a_key_whose_layers_are_decided_by_several_before_it_is_refused(argument: str) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})

    with pytest.raises(TargetError, match=r"'\[ab\]' has no effect on .*: 'a', 'b' before it match all"):
        adapted(build(), **{argument: {"a": 1, "b": 2, "[ab]": 3}})
    assert adapted(build(), **{argument: {"a": 1, "b": 2, "[abc]": 3}}) == ("a", "b", "c")


def test_the_rank_may_be_the_smaller_side_and_no_more() -> None:
    model = nn.ModuleDict({"wide": nn.Linear(9, 3)})
    assert adapted(model, r=3) == ("wide",)
    with pytest.raises(ConfigError, match=r"'wide' \(r=4, at most 3\)"):
        adapted(nn.ModuleDict({"wide": nn.Linear(9, 3)}), r=4)

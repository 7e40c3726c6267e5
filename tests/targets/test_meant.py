"""A pattern that matches nothing is answered with what was perhaps meant, in words that can be copied."""

import ast
import re
from typing import Any

import pytest
import yaml
from torch import nn

import lightning_lora as ll
from lightning_lora.tables import grouped_by_name


def model() -> nn.ModuleDict:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.ModuleDict(
        {
            "encoder": nn.TransformerEncoder(layer, 2),
            "head": nn.Linear(8, 2),
            "words": nn.Embedding(20, 8),
        }
    )


def said(**config: Any) -> str:
    with pytest.raises(ll.LoRAError) as error:
        ll.inject_adapters(model(), ll.LoRAConfig(r=2, **config))
    return str(error.value)


def adapted(**config: Any) -> tuple[str, ...]:
    return ll.inject_adapters(model(), ll.LoRAConfig(r=2, **config))


LINEAR = ("encoder.layers.0.linear1", "encoder.layers.1.linear1")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["encoder.layers.*.linear1"], LINEAR),
        (["*.linear1"], LINEAR),
        ("*.linear1", LINEAR),
        (["layers.0-1.linear1"], LINEAR),
        ("layers.0-1.linear1", LINEAR),
        (["encoder.layers.*.linear1 (×2)"], LINEAR),
        ([r".*\.linear1"], LINEAR),
        (["head", "*.linear1"], (*LINEAR, "head")),
    ],
)
def test_a_wildcard_or_a_row_of_a_table_is_answered_with_an_expression_that_means_it(
    given: Any, expected: Any
) -> None:
    found = said(target_modules=given)
    written = re.findall(r'r"(.*?)"', found)
    assert adapted(target_modules=written[0]) == expected
    assert "*" not in str(given) or '"*" is no wildcard' in found


# one of them is a whole name
@pytest.mark.parametrize("given", [["linear1|linear2"], ["head|linear1|linear2"]])
def test_alternatives_in_a_list_are_answered_with_an_expression_for_all_their_ends(
    given: list[str],
) -> None:
    (written,) = re.findall(r'r"(.*?)"', said(target_modules=given))
    assert adapted(target_modules=written) == adapted(
        target_modules=given[0].split("|")
    )


def test_each_name_in_a_table_is_answered_with_all_layers_in_its_row() -> None:
    kinds = {
        name: type(layer).__name__
        for name, layer in model().named_modules()
        if isinstance(layer, nn.Linear)
    }
    kinds = {name: kind for name, kind in kinds.items() if kind == "Linear"}
    for row, names in grouped_by_name(kinds, str):
        if row not in names:
            (written,) = re.findall(r'r"(.*?)"', said(target_modules=[row]))
            assert adapted(target_modules=written) == tuple(names)


@pytest.mark.parametrize("given", ["linear1,head", "linear1, head", ["linear1,head"]])
@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
def test_names_between_commas_are_answered_with_a_list_in_python_and_in_yaml(
    argument: str, given: Any
) -> None:
    found = said(**{argument: given})
    (written,) = re.findall(rf"write a list: {argument}=(\[.*?\])", found)
    (in_yaml,) = re.findall(r"In YAML: (\[.*?\])", found)
    assert ast.literal_eval(written) == yaml.safe_load(in_yaml) == ["linear1", "head"]


@pytest.mark.parametrize("argument", ["modules_to_save", "target_parameters"])
def test_a_string_where_only_a_list_can_be_is_answered_with_that_list(
    argument: str,
) -> None:
    found = said(**{argument: "a.weight, b"})
    assert f"{argument}=['a.weight', 'b']. In YAML: [a.weight, b]." in found


def test_an_expression_is_shown_as_it_was_given() -> None:
    assert (
        "target_modules='linear' is an expression, and matches no whole name"
        in said(target_modules="linear")
    )
    assert "target_modules ['linear'] match no module" in said(
        target_modules=["linear"]
    )


def test_names_and_keys_are_answered_in_their_own_form() -> None:
    assert "Write the names: modules_to_save=['head']." in said(modules_to_save=["he*"])
    assert "write a key for each: 'linear1', 'head'." in said(
        rank_pattern={"linear1,head": 4}
    )
    assert r'"*" is no wildcard in it. Perhaps write r".*\.linear1"' in said(
        rank_pattern={"*.linear1": 4}
    )


def test_a_name_that_several_entries_may_mean_is_said_once() -> None:
    assert "Write the names: modules_to_save=['head']." in said(
        modules_to_save=["he*", "h*", "xyz"]
    )


@pytest.mark.parametrize("argument", ["modules_to_save", "exclude_modules"])
def test_a_layer_in_two_arguments_and_nothing_else_is_named_with_both(
    argument: str,
) -> None:
    found = said(**{"target_modules": ["head"], argument: ["head"]})
    assert f"target_modules and {argument} both mean 'head' of ModuleDict" in found
    assert "Linear4bit" not in found


def test_rows_for_an_embedding_of_another_name_are_answered_with_that_name() -> None:
    found = said(trainable_token_indices=[5])
    assert "embed_tokens" in found
    assert "trainable_token_indices={'words': [5]}" in found
    assert "self_attn" not in found
    assert "words" in adapted(trainable_token_indices={"words": [5]})
    assert "Its embeddings are 'words'." in said(
        trainable_token_indices={"tokens": [5]}
    )
    with pytest.raises(ll.TargetError, match=r"Sequential has no nn\.Embedding"):
        ll.inject_adapters(
            nn.Sequential(nn.Linear(4, 4)),
            ll.LoRAConfig(r=2, trainable_token_indices=[5]),
        )

"""Names of modules and parameters, with wrappers, shared modules and tied parameters."""

from collections.abc import Collection

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)

from lightning_lora.tensors.names import (
    direct_parameters,
    find_parameter,
    is_bias,
    is_in,
    is_in_any,
    join,
    largest_free_of,
    modules_around,
    modules_by_all_names,
    modules_by_name,
    names_inside,
    names_joined,
    names_outside,
    own_parameter,
    owner_of,
    owner_or_itself,
    parameters_by_name,
    plain_module,
    plain_name,
    set_tensor,
    starts_of,
    submodule,
    with_all_inside,
)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())


def test_wrappers_of_torch_are_in_no_name() -> None:
    inner = net()
    model = nn.ModuleDict(
        {"a": torch.compile(inner, backend="eager"), "b": checkpoint_wrapper(net())}
    )
    named = modules_by_name(model)
    assert list(named) == ["", "a", "a.0", "a.1", "b", "b.0", "b.1"]
    assert named["a"] is inner
    assert list(parameters_by_name(model)) == [
        "a.0.weight",
        "a.0.bias",
        "b.0.weight",
        "b.0.bias",
    ]
    assert submodule(model, "a.0") is inner[0]
    assert submodule(model, "") is model
    assert plain_module(model["a"]) is inner
    assert [plain_name(name) for name, _ in model["a"].named_parameters()] == [
        "0.weight",
        "0.bias",
    ]


def test_a_shared_module_has_its_first_name_or_all_of_them() -> None:
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"one": shared, "two": shared, "none": nn.Identity()})
    assert list(modules_by_name(model)) == ["", "one", "none"]
    assert list(modules_by_all_names(model)) == ["", "one", "two", "none"]


def test_a_tied_parameter_is_named_once() -> None:
    model = nn.ModuleDict(
        {"words": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)}
    )
    model["head"].weight = model["words"].weight
    assert list(parameters_by_name(model)) == ["words.weight"]
    assert list(direct_parameters({"head": model["head"]})) == ["head.weight"]


def test_modules_have_only_their_own_parameters() -> None:
    model = net()
    model.scale = nn.Parameter(torch.ones(1))
    assert list(direct_parameters({"": model})) == ["scale"]
    assert list(direct_parameters({"net": model})) == ["net.scale"]
    assert with_all_inside([model]) == {model, model[0], model[1]}


@pytest.mark.parametrize(
    ("prefix", "name", "whole"), [("", "a", "a"), ("a", "", "a"), ("a.b", "c", "a.b.c")]
)
def test_names_are_joined(prefix: str, name: str, whole: str) -> None:
    assert join(prefix, name) == whole
    assert names_joined(prefix, [name]) == [whole]


@pytest.mark.parametrize(
    ("name", "modules", "is_inside"),
    [
        ("a.b.weight", {"a"}, True),
        ("a.b", {"a.b"}, True),
        ("a.b", {"a.b.c"}, False),
        ("ab.weight", {"a"}, False),
        ("a.b", set(), False),
    ],
)
def test_a_name_is_in_a_module(name: str, modules: set[str], is_inside: bool) -> None:
    assert is_in_any(name, modules) is is_inside
    assert any(is_in(name, module) for module in modules) is is_inside
    assert names_inside([name], modules) == [name] * is_inside
    assert names_outside([name], modules) == [name] * (not is_inside)


def test_everything_is_in_the_model_itself() -> None:
    assert is_in("a.b", "")
    assert is_in("", "")


def test_modules_around_a_name_the_outermost_first() -> None:
    assert starts_of("a.b.c") == ["a", "a.b", "a.b.c"]
    assert modules_around(["a.b", "c"]) == {"a", "a.b", "c"}


@pytest.mark.parametrize(
    ("others", "largest"),
    [
        ([], "a"),
        (["a"], "a.b"),
        (["a", "a.b"], "a.b.c"),
        (["a", "a.b", "a.b.c"], "a.b.c"),
    ],
)
def test_the_largest_module_that_is_none_of_others(
    others: Collection[str], largest: str
) -> None:
    assert largest_free_of(others, "a.b.c") == largest


def test_names_of_parameters() -> None:
    assert (owner_of("a.b.weight"), owner_of("scale")) == ("a.b", "")
    assert (owner_or_itself("a.b.weight"), owner_or_itself("scale")) == ("a.b", "scale")
    assert is_bias("a.in_proj_bias")
    assert not is_bias("bias.weight")


def test_a_parameter_is_found_in_its_own_module_alone() -> None:
    model = net()
    assert find_parameter(model[0], "weight") is model[0].weight
    assert find_parameter(model, "weight") is None
    assert find_parameter(nn.Linear(2, 2, bias=False), "bias") is None
    assert own_parameter(model, "0.weight") is model[0].weight


@pytest.mark.parametrize("name", ["0.scale", "1.weight", "0.bias"])
def test_a_parameter_that_must_be_there_is_named(name: str) -> None:
    model = net()
    model[0].bias = None
    with pytest.raises(AttributeError, match=f"Sequential has no parameter '{name}'"):
        own_parameter(model, name)


def test_a_parameter_is_replaced_where_it_is() -> None:
    model = net()
    other = nn.Parameter(torch.zeros(2))
    set_tensor(model, "0.bias", other)
    assert model[0].bias is other


@pytest.mark.parametrize("name", ["_forward_module", "_original_module"])
def test_one_of_the_two_names_in_fabrics_wrapper_makes_no_wrapper(name: str) -> None:
    model = nn.Module()
    model.add_module(name, nn.Linear(2, 2))
    assert plain_module(model) is model

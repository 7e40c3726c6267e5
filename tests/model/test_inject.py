"""An injection is done whole or not at all."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.support.models import LitTiny, flags, same, state, unfreezable
from tests.support.storage import trained


def test_injection_is_idempotent_and_takes_in_new_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    config = ll.LoRAConfig(r=2, modules_to_save=None)
    ll.inject_adapters(model, config)
    factor = model[0].lora_A
    model.append(nn.Linear(4, 4))
    assert ll.inject_adapters(model, config) == ("0", "1")
    assert model[0].lora_A is factor and not model[1].weight.requires_grad


OTHERS: list[dict[str, Any]] = [{"r": 1}, {"alpha": 7}, {"dropout": 0.1}, {"target_modules": ["v_proj"]}]


@pytest.mark.parametrize("other", [*OTHERS, {"modules_to_save": ["head"]}, {"bias": "all"}], ids=str)
def test_another_config_on_an_adapted_model_is_refused(other: dict[str, Any]) -> None:
    model, config = LitTiny(), {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    ll.inject_adapters(model, ll.LoRAConfig(**config))
    before = state(model)
    with pytest.raises(ll.AdapterMismatchError, match="adapted already"):
        ll.inject_adapters(model, ll.LoRAConfig(**(config | other)))
    assert same(state(model), before)


def test_injecting_something_else_is_an_error() -> None:
    with pytest.raises(ll.ConfigError, match="LoRAConfig"):
        ll.inject_adapters(nn.Linear(2, 2), {"r": 8})  # type: ignore[arg-type]


def test_adapting_again_asks_for_the_same_kind_of_start() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, init="gaussian"))  # which makes no difference any more
    with pytest.raises(ll.AdapterMismatchError, match="with init=None; this configuration asks for init=pissa"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, init="pissa"))


def test_adapters_that_are_made_in_inference_mode_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.inference_mode():
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].lora_B.grad is not None


@pytest.mark.parametrize("lazy", ["weight", "running_mean", "table"])
def test_what_is_lazy_is_named_and_nothing_is_changed(lazy: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4) if lazy == "weight" else nn.Identity())
    if lazy == "running_mean":
        model[1] = nn.LazyBatchNorm1d(affine=False)
    if lazy == "table":
        model.register_buffer("table", nn.parameter.UninitializedBuffer())
    name = lazy if lazy == "table" else f"1.{lazy}"
    with pytest.raises(ll.ConfigError, match=rf"'{name}'.*lazy.*Run one batch"):
        ll.inject_adapters(model, ll.LoRAConfig(r=1, target_modules=["0"]))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_integer_parameters_of_a_module_that_trains_whole_stay(tmp_path: Path) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].codes = nn.Parameter(torch.arange(4), requires_grad=False)
    ll.inject_adapters(model, ll.LoRAConfig(r=1, modules_to_save=["head"]))
    assert model["head"].weight.requires_grad and not model["head"].codes.requires_grad


def test_head_replaced_after_injection_is_the_one_that_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    config = ll.LoRAConfig(r=1, modules_to_save=["1"])
    ll.inject_adapters(model, config)
    model[1] = nn.Linear(4, 3)
    ll.inject_adapters(model, config)
    ll.remove_adapters(model)
    assert model(torch.zeros(4)).shape == (3,)


def test_a_call_on_a_plain_model_says_what_to_do() -> None:
    with pytest.raises(ll.AdapterStateError, match="inject_adapters"):
        ll.merge_adapters(LitTiny())
    with pytest.raises(ll.AdapterStateError, match="'0': pass that module"):
        ll.merge_adapters(nn.Sequential(trained()))


# An injection that fails midway


def test_an_injection_that_fails_midway_remembers_no_flag_of_what_it_saw() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    config = ll.LoRAConfig(r=2)
    ll.inject_adapters(model, config)
    model.extend([nn.Linear(4, 4), unfreezable()])
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        ll.inject_adapters(model, config)
    del model[2]
    model[1].requires_grad_(False)
    ll.inject_adapters(model, config)
    ll.remove_adapters(model)
    assert flags(model) == {"0.weight": True, "0.bias": True, "1.weight": False, "1.bias": False}


def test_a_model_with_a_place_for_a_module_that_is_not_there_is_adapted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model.register_module("head", None)
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    assert ll.summarize(model).trained == 2 * (4 + 4) + 2 * (4 + 2)
    ll.remove_adapters(model)
    assert model.head is None and type(model[0]) is nn.Linear


@pytest.mark.parametrize("fails", [True, False])
def test_a_base_that_was_made_in_inference_mode_is_given_back_as_it_was(fails: bool) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if fails:
        model.append(unfreezable())
    before, kinds, values = flags(model), [type(module) for module in model.modules()], state(model)
    with pytest.raises(RuntimeError, match="cannot be frozen") if fails else nullcontext():
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
    if not fails:
        ll.merge_adapters(model)
        ll.unmerge_adapters(model)
        ll.remove_adapters(model)
    assert flags(model) == before
    assert kinds == [type(module) for module in model.modules()] and same(state(model), values)

"""A merge that fails midway, and a merge and an un-merge of tied weights: all is as before."""

import copy

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterStateError,
    LoRAConfig,
    disable_adapters,
    inject_adapters,
    merge_adapters,
    remove_adapters,
    unmerge_adapters,
)
from tests.model.faults import FailsOnce
from tests.models import TinyLM, randomise, same, state, unties


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_merge_that_fails_at_the_second_layer_merges_nothing(error: BaseException) -> None:
    base, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)).double(), torch.randn(3, 4, dtype=torch.float64)
    model = copy.deepcopy(base)
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    values, expected = state(model), model(x)
    with FailsOnce((6, 5), error) as merging, pytest.raises(type(error)):
        merge_adapters(model)
    assert merging.failed
    assert all(torch.equal(layer.weight, own.weight) for layer, own in zip(model, base, strict=True))
    assert same(state(model), values)
    output = model(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    assert all(layer.lora_A.grad.any() and layer.lora_B.grad.any() for layer in model)
    with disable_adapters(model):
        torch.testing.assert_close(model(x), base(x))
    merge_adapters(model)
    torch.testing.assert_close(model(x), expected)


@unties
@pytest.mark.parametrize(
    ("targets", "saved"),
    [(["lm_head"], None), (["lm_head", "embed"], None), (["lm_head"], ["embed"])],
    ids=["one use", "both uses", "the other trains"],
)
def test_what_trains_of_a_tied_weight_is_the_same_after_a_merge_and_its_undoing(
    targets: list[str], saved: list[str] | None
) -> None:
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2, target_modules=targets, modules_to_save=saved))
    randomise(model)
    before, values = {name: p.requires_grad for name, p in model.named_parameters()}, state(model)
    assert before["embed.weight"] is bool(saved)
    merge_adapters(model)
    unmerge_adapters(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert same(state(model), values) and model.lm_head.weight is model.embed.weight
    remove_adapters(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_merge_of_what_has_no_values_is_refused_and_changes_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    model.append(nn.Linear(4, 4))
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model[1])
    weight = model[1].weight.detach().clone()
    with pytest.raises(AdapterStateError, match="'0' in Sequential have no values yet"):
        merge_adapters(model)
    assert torch.equal(model[1].weight, weight)

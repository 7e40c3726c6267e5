"""DoRA, PiSSA and OLoRA compute what their papers say."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_lora as ll
from tests.support.layers import LAYERS, Factors, Model, config, factors, reference_weights, train
from tests.support.models import randomise, same, state

CONVOLUTIONS = ["convolution", "grouped convolution", "circular convolution", "standardised convolution"]
DORA = ["linear", "linear without bias", "conv1d", "scaled", "normalised", "embedding", *CONVOLUTIONS]
PISSA = ["linear", "conv1d", "scaled", "grouped convolution", "transposed convolution", "bilinear", "packed lstm"]
PISSA += ["gru", "attention", "attention to others", "experts"]
METHODS = [("dora", {"use_dora": True}, name) for name in DORA]
METHODS += [("pissa", {"init": "pissa"}, name) for name in PISSA]
METHODS += [("olora", {"init": "olora"}, name) for name in ("linear", "depthwise convolution", "lstm cell", "experts")]
Case = tuple[Model, Any, ll.LoRAConfig]


@pytest.fixture(params=METHODS, ids=lambda method: f"{method[0]}-{method[2]}")
def adapted(request: pytest.FixtureRequest) -> Case:
    """A model that is about to be adapted by one method, its input, and the configuration."""
    _, arguments, name = request.param
    build, x = LAYERS[name]
    torch.manual_seed(0)
    model = Model(build()).double()
    return model, x, config(model, **arguments)


def as_rows(layer: Any, weight: Tensor) -> Tensor:
    return weight.T if isinstance(layer, nn.Embedding | Conv1D) else weight.flatten(1)


def weights_of(layer: Any, lora: Factors) -> dict[str, Tensor]:
    """What the papers say of the adapted weights."""
    updated = reference_weights(layer, lora)
    if "lora_magnitude" in lora:
        rows = as_rows(layer, updated["weight"])
        rows = lora["lora_magnitude"][:, None] * rows / rows.norm(dim=1, keepdim=True).detach()
        transposed = isinstance(layer, nn.Embedding | Conv1D)
        return {"weight": (rows.T if transposed else rows).reshape(layer.weight.shape)}
    starts = {name.replace("0", "", 1): p.detach() for name, p in lora.items() if name[5:7] in ("A0", "B0")}
    if not starts:
        return updated
    started = reference_weights(layer, starts)
    return {name: layer.get_parameter(name) + updated[name] - started[name] for name in updated}


def reference(model: Model, lora: Factors, x: Any) -> Tensor:
    plain = copy.deepcopy(model)
    ll.remove_adapters(plain)
    weights = {f"0.{name}": weight for name, weight in weights_of(model[0], lora).items()}
    return torch.func.functional_call(plain, weights, (x,))


def test_fresh_it_changes_nothing_and_trained_it_computes_what_its_paper_says(adapted: Case) -> None:
    model, x, how = adapted
    before, base = model(x), state(model)
    ll.inject_adapters(model, how)
    assert torch.equal(model(x), before)
    train(model)
    lora = factors(model[0])
    output, expected = model(x), reference(model, lora, x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    for name, p in model[0].named_parameters():
        assert (p.grad is not None) is p.requires_grad
        if p.requires_grad:
            torch.testing.assert_close(p.grad, lora[name].grad)
    ll.remove_adapters(model)
    assert same(state(model), base)


def test_saved_it_loads_and_merged_it_computes_the_same(adapted: Case, tmp_path: Path) -> None:
    model, x, how = adapted
    other = copy.deepcopy(model)
    ll.inject_adapters(model, how)
    train(model)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(other, tmp_path / "a.safetensors")
    before, output = state(model), model(x)
    assert same(state(other), before) and torch.equal(other(x), output)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    ll.unmerge_adapters(model)
    assert same(state(model), before) and torch.equal(model(x), output)


def test_rows_and_directions_of_zeros_train_as_without_the_method() -> None:
    """A projection that starts at zero, as some do, has neither a direction nor anything that is strongest in it."""
    for arguments in ({"use_dora": True}, {"init": "pissa"}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=False))
        nn.init.zeros_(model[0].weight)
        ll.inject_adapters(model, ll.LoRAConfig(r=3, **arguments))
        x = torch.randn(4, 6)
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            (model(x) - 1).square().sum().backward()
            optimizer.step()
        assert (model(x) - nn.functional.linear(x, model[0].weight)).abs().gt(1e-3).all()


@pytest.mark.parametrize("name", ["lstm", "attention", "bilinear", "bag", "transposed convolution", "experts"])
def test_dora_is_refused_where_it_has_no_meaning(name: str) -> None:
    model = Model(LAYERS[name][0]()).double()
    with pytest.raises(ll.TargetError, match=r"use_dora=True is for .* '0' .*exclude_modules"):
        ll.inject_adapters(model, config(model, use_dora=True))


def test_all_rows_with_a_name_have_one_magnitude_without_it() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    how = ll.LoRAConfig(r=2, use_dora=True, target_modules=["0"], target_slices={"0": {"all": [0, 5]}})
    ll.inject_adapters(model, how)
    assert list(ll.adapter_state_dict(model)) == ["0.lora_A_all", "0.lora_B_all", "0.lora_magnitude"]


def test_magnitudes_of_a_half_precision_base_are_not_rounded() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)).bfloat16(), torch.randn(3, 64).bfloat16()
    before = model(x)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, use_dora=True, autocast_adapter_dtype=False))
    assert torch.equal(model(x), before) and model[0].lora_magnitude.dtype is torch.float32
    assert torch.equal(model.to(torch.bfloat16)(x), before)


@pytest.mark.parametrize(
    ("factor", "arguments"),
    [("lora_magnitude", {"use_dora": True}), ("lora_A", {"init": "pissa"}), ("lora_B", {"init": "olora"})],
)
def test_what_trained_of_an_adapter_that_depends_on_its_base_is_an_update(factor: str, arguments: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, **arguments))
    parameter = model.get_parameter(f"0.{factor}")
    with torch.no_grad():
        parameter.mul_(2)
    trained = parameter.detach().clone()
    with pytest.warns(ll.LoRAWarning, match="stay as they are, trained"):
        model.load_state_dict({"0.weight": torch.randn(5, 6), "0.bias": torch.zeros(5)})
    assert torch.equal(parameter, trained)


def test_outputs_under_autocast_have_the_dtype_that_the_layer_gives() -> None:
    for name in ("linear", "convolution"):
        build, x = LAYERS[name]
        model = Model(build())
        ll.inject_adapters(model, config(model, use_dora=True))
        randomise(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x.float()).dtype is torch.bfloat16

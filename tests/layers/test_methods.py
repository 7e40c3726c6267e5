"""DoRA, PiSSA and OLoRA compute what their papers say."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    LoRAConfig,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    unmerge_adapters,
)
from tests.support.layers import LAYERS, Factors, Model, config, factors, reference_weights, train
from tests.support.models import same, state

EMBEDDINGS = [name for name in LAYERS if "embedding" in name or "bag" in name]
CONVOLUTIONS = [name for name in LAYERS if "convolution" in name and "transposed" not in name]
DORA = ["linear", "linear without bias", "subclass", "conv1d", "scaled", "normalised", "embedding", *CONVOLUTIONS]
METHODS = [("dora", {"use_dora": True}, name) for name in DORA]
METHODS += [(i, {"init": i}, name) for i in ("pissa", "olora") for name in LAYERS if name not in EMBEDDINGS]


@pytest.fixture(params=METHODS, ids=lambda method: f"{method[0]}-{method[2]}")
def adapted(request: pytest.FixtureRequest) -> tuple[Model, Any, LoRAConfig]:
    """A model that is about to be adapted by one method, its input, and the configuration."""
    _, arguments, name = request.param
    build, x = LAYERS[name]
    torch.manual_seed(0)
    model = Model(build()).double()
    return model, x, config(model, **arguments)


def test_fresh_it_changes_nothing(adapted: tuple[Model, Any, LoRAConfig]) -> None:
    model, x, how = adapted
    before, base = model(x), state(model)
    inject_adapters(model, how)
    assert torch.equal(model(x), before)
    remove_adapters(model)
    assert same(state(model), base)


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
    remove_adapters(plain)
    weights = {f"0.{name}": weight for name, weight in weights_of(model[0], lora).items()}
    return torch.func.functional_call(plain, weights, (x,))


def test_trained_it_computes_what_its_paper_says(adapted: tuple[Model, Any, LoRAConfig]) -> None:
    model, x, how = adapted
    base = state(model)
    inject_adapters(model, how)
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
    remove_adapters(model)
    assert same(state(model), base)


def test_merged_it_computes_the_same_and_comes_apart_exactly(adapted: tuple[Model, Any, LoRAConfig]) -> None:
    model, x, how = adapted
    inject_adapters(model, how)
    train(model)
    before, output = state(model), model(x)
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    unmerge_adapters(model)
    assert same(state(model), before) and torch.equal(model(x), output)


def test_saved_it_loads_onto_the_untouched_base(adapted: tuple[Model, Any, LoRAConfig], tmp_path: Path) -> None:
    model, x, how = adapted
    other = copy.deepcopy(model)
    inject_adapters(model, how)
    train(model)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(other, tmp_path / "a.safetensors")
    assert same(state(other), state(model)) and torch.equal(other(x), model(x))


def test_rows_and_directions_of_zeros_train_as_without_the_method() -> None:
    """A projection that starts at zero, as some do, has neither a direction nor anything that is strongest in it."""
    for arguments in ({"use_dora": True}, {"init": "pissa"}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5, bias=False))
        nn.init.zeros_(model[0].weight)
        inject_adapters(model, LoRAConfig(r=3, **arguments))
        x = torch.randn(4, 6)
        assert torch.equal(model(x), nn.functional.linear(x, model[0].weight))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            (model(x) - 1).square().sum().backward()
            optimizer.step()
        assert (model(x) - nn.functional.linear(x, model[0].weight)).abs().gt(1e-3).all()

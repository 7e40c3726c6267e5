"""DoRA, PiSSA and OLoRA compute what their papers say."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.compared import assert_state
from tests.support.layers import LAYERS, Model, config, factors, reference, train
from tests.support.models import state
from tests.support.parameters import add_to, trainable

KINDS: dict[str, list[str]] = {
    "dora": [
        "linear",
        "conv1d",
        "normalised",
        "embedding",
        "convolution",
        "grouped convolution",
    ],
    "pissa": [
        "linear",
        "grouped convolution",
        "transposed convolution",
        "bilinear",
        "gru",
        "attention",
        "experts",
    ],
    "olora": ["linear", "experts"],
}


def cases() -> list[tuple[str, str, int]]:
    """Each method with each kind of layer, and with more than its largest rank."""
    found = []
    for method, names in KINDS.items():
        for name in names:
            found.append((method, name, 2))
        found.append((method, "linear", 64))
    return found


HOW: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "pissa": {"init": "pissa"},
    "olora": {"init": "olora"},
}


def assert_gradients(layer: nn.Module, lora: dict[str, Tensor]) -> None:
    """Expect the gradients of these factors for what trains, and none for the rest."""
    for name, p in layer.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, lora[name].grad)
        else:
            assert p.grad is None


@pytest.mark.parametrize(("method", "name", "r"), cases())
def test_each_method_computes_what_its_paper_says(
    method: str, name: str, r: int, tmp_path: Path
) -> None:
    build, x = LAYERS[name]
    model: Any = Model(build()).double()
    fresh = model(x)
    base = state(model)
    plain = copy.deepcopy(model)
    ll.inject_adapters(model, config(model, r=r, alpha=1.5 * r, **HOW[method]))
    assert torch.equal(model(x), fresh)
    train(model)
    lora = factors(model[0])
    output = model(x)
    expected = reference(model, lora, x)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(model[0], lora)
    trained = state(model)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(plain, tmp_path / "a.safetensors")
    assert_state(plain, trained)
    assert torch.equal(plain(x), output)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    ll.unmerge_adapters(model)
    assert_state(model, trained)
    assert torch.equal(model(x), output)
    ll.remove_adapters(model)
    assert_state(model, base)


@pytest.mark.parametrize("arguments", [{"use_dora": True}, {"init": "pissa"}], ids=str)
def test_rows_and_directions_of_zeros_train_as_without_the_method(
    arguments: dict[str, Any],
) -> None:
    """A projection may start at zero: it has no direction then, and nothing that is strongest in it."""
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    x = torch.randn(4, 6)
    nn.init.zeros_(model[0].weight)
    ll.inject_adapters(model, ll.LoRAConfig(r=3, **arguments))
    assert not model(x).any()
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(2):
        loss = (model(x) - 1).square().sum()
        loss.backward()
        optimizer.step()
    assert model(x).abs().gt(1e-3).all()


@pytest.mark.parametrize(
    "name",
    ["lstm", "attention", "bilinear", "bag", "transposed convolution", "experts"],
)
def test_dora_is_refused_where_it_has_no_meaning(name: str) -> None:
    model = Model(LAYERS[name][0]()).double()
    with pytest.raises(
        ll.TargetError, match=r"use_dora=True is for .* '0' .*exclude_modules"
    ):
        ll.inject_adapters(model, config(model, use_dora=True))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_dora", [True, False])
def test_a_start_from_the_weights_is_refused_for_embeddings_with_dora_too(
    init: str, use_dora: bool
) -> None:
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
    before = state(model)
    with pytest.raises(
        ll.TargetError,
        match=rf"init='{init}' is for layers other than embeddings.*'0' \(Embedding\)",
    ):
        ll.inject_adapters(model, config(model, init=init, use_dora=use_dora))
    assert_state(model, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_magnitudes_of_a_half_precision_base_are_its_own_and_not_rounded(
    dtype: torch.dtype,
) -> None:
    """Whether the base is converted before the adapters come, or afterwards."""
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(3, 64).bfloat16()
    plain = copy.deepcopy(model).bfloat16()
    model.to(dtype)
    ll.inject_adapters(
        model, ll.LoRAConfig(r=2, use_dora=True, autocast_adapter_dtype=False)
    )
    assert torch.equal(model.bfloat16()(x), plain(x))
    assert model[0].lora_magnitude.dtype is torch.float32


@pytest.mark.parametrize(
    ("factor", "arguments"),
    [("lora_magnitude", {"use_dora": True}), ("lora_A", {"init": "pissa"})],
)
def test_what_trained_of_an_adapter_that_depends_on_its_base_is_an_update(
    factor: str, arguments: Any
) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, **arguments))
    parameter = model.get_parameter(f"0.{factor}")
    add_to(parameter, 1)
    trained = parameter.detach().clone()
    with pytest.warns(ll.LoRAWarning, match="below trained adapters"):
        model.load_state_dict({"0.weight": torch.randn(5, 6), "0.bias": torch.zeros(5)})
    assert torch.equal(parameter, trained)

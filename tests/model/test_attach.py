"""Adapters on their layers, and norms of the frozen base: the same in every mode."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import AdapterStateError, LoRAConfig, inject_adapters, merge_adapters, remove_adapters
from tests.support.layers import config
from tests.support.models import as_trained, randomise, same, state


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["1.linear1"], ["0.linear2"]])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_are_adapted_in_eval_and_inference_mode(targets: Any, norm_first: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).double()
    x = torch.randn(3, 5, 8, dtype=torch.double)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padded else None
    kept = ~padding if padding is not None else slice(None)
    base = model(x, src_key_padding_mask=padding)[kept]
    as_trained(model, target_modules=targets)
    expected = model(x, src_key_padding_mask=padding)[kept]
    assert not torch.allclose(expected, base)
    model.eval()
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)
    merge_adapters(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)


def switches(model: nn.TransformerEncoder) -> list[Any]:
    return [*(layer.activation_relu_or_gelu for layer in model.layers), model.use_nested_tensor]


@pytest.mark.parametrize("part_first", [False, True])
def test_an_encoder_that_was_adapted_twice_has_its_own_inference_path_again(part_first: bool) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    own = switches(model)
    inject_adapters(model.layers[0] if part_first else model, LoRAConfig(r=2, target_modules=["linear1"]))
    inject_adapters(model, LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    remove_adapters(model)
    assert switches(model) == own == [1, 1, True]


UNDERMINED: dict[str, Any] = {
    "prune": lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.5),
    "weight norm": lambda layer: nn.utils.parametrizations.weight_norm(layer),
    "old weight norm": lambda layer: nn.utils.weight_norm(layer),
    "spectral norm": lambda layer: nn.utils.parametrizations.spectral_norm(layer),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("undermine", UNDERMINED.values(), ids=UNDERMINED)
def test_weight_that_is_computed_since_injection_is_not_merged_or_given_back(undermine: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject_adapters(model, config(model))
    randomise(model)
    undermine(model[0])
    adapted = model.eval()(torch.ones(8))
    for call in (merge_adapters, remove_adapters):
        with pytest.raises(AdapterStateError, match=r"weight of '0' of Sequential is computed"):
            call(model)
    assert torch.equal(model(torch.ones(8)), adapted)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (3, 4)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 2, 2)),
        (nn.BatchNorm3d(4, momentum=None), (3, 4, 2, 2, 2)),
        (nn.SyncBatchNorm(4), (3, 4, 2)),
        (nn.InstanceNorm1d(4, track_running_stats=True), (3, 4, 5)),
    ],
)
def test_frozen_norm_does_not_drift_and_trains_as_it_evaluates(norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"norm": norm, "linear": nn.Linear(4, 4)})
    kind, before, x = type(norm), state(norm), torch.randn(shape)
    inject_adapters(model, LoRAConfig(r=2))
    model.train()
    trained = norm(x)
    assert norm.training and same(state(norm), before)
    assert torch.equal(trained, norm.eval()(x))
    again = copy.deepcopy(model)
    assert torch.equal(again["norm"].train()(x), trained) and same(state(again["norm"]), before)
    remove_adapters(model)
    assert type(norm) is kind
    norm.train()(x)
    assert not same(state(norm), before)


def test_norm_that_is_named_trains_whole_and_one_without_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4)), nn.BatchNorm1d(4))
    model.append(nn.BatchNorm1d(4, track_running_stats=False))
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["1", "2"]))
    before = state(model)
    model(torch.randn(8, 4))
    after = state(model)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {f"{name}.{part}" for name in ("1", "2.0") for part in list(model[1]._buffers)}
    assert type(model[4]) is nn.BatchNorm1d


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_norm_is_in_its_own_mode_after_a_forward_that_fails(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4))
    inject_adapters(model, LoRAConfig(r=2))
    model.train(training)
    with pytest.raises(ValueError, match="expected"):
        model[1](torch.ones(2, 4))
    assert model[1].training is training


def test_norms_of_a_base_loaded_with_its_adapters_are_the_bases() -> None:
    model, again = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    for buffer in model[1].buffers():
        buffer.add_(2)
    for each in (model, again):
        inject_adapters(each, LoRAConfig(r=1))
    randomise(model)
    again.load_state_dict(model.state_dict())
    remove_adapters(again)
    remove_adapters(model)
    assert same(state(again), state(model))

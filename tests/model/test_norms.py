"""Norms of the frozen base stand still."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters, remove_adapters
from tests.support.models import randomise, same, state


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


def test_norm_that_is_named_trains_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4)), nn.BatchNorm1d(4))
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["1", "2"]))
    before = state(model)
    model(torch.randn(8, 4))
    after = state(model)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {f"{name}.{part}" for name in ("1", "2.0") for part in list(model[1]._buffers)}


def test_norm_without_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4))
    inject_adapters(model, LoRAConfig(r=2))
    assert [type(module) for module in model[1:]] == [nn.BatchNorm1d, nn.LayerNorm]


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (2, 4, 3, 3)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (2, 4)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), (2, 4)),
}


@pytest.mark.parametrize(("build", "wrong"), NORMS.values(), ids=NORMS)
def test_a_frozen_norm_is_in_its_own_mode_after_a_forward_that_fails(
    build: Callable[[], nn.Module], wrong: tuple[int, ...]
) -> None:
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "norm": build()})
    inject_adapters(model, LoRAConfig(r=2))
    for training in (True, False):
        model.train(training)
        with pytest.raises(ValueError, match="expected"):
            model["norm"](torch.ones(wrong))
        assert model["norm"].training is training


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

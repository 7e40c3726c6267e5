"""Tensor parallelism: factors follow their weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from packaging.version import Version
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.support.ranks import run_ranks
from tests.support.sharded import LitNet, State, assert_same, built, fit, path_of, pretrained, whole_state

pytestmark = pytest.mark.processes

PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Parallel(LitNet):  # splits the matrices of its blocks, and shards them too if there are processes for it
    def shard(self) -> None:
        for layer in self.model.layers:
            parallelize_module(layer, self.device_mesh["tensor_parallel"], PLAN)
        if self.device_mesh["data_parallel"].size() > 1:
            super().shard()


def one_process(folder: Path, kwargs: dict[str, Any], path: Path | None = None) -> State:
    return fit("one", folder, Parallel, {"dropout": 0.0, **kwargs}, path, use_distributed_sampler=False)


def parallel(size: int, folder: Path, kwargs: dict[str, Any], path: Path | None = None) -> State:
    options: dict[str, Any] = {"devices": 2 * size, "strategy": ModelParallelStrategy(size, 2)}
    kwargs = {"dropout": 0.0, **kwargs}
    return fit("parallel", folder, Parallel, kwargs, path, use_distributed_sampler=False, **options)


def in_processes(size: int, folder: Path, kwargs: dict[str, Any], path: Path | None = None) -> list[State]:
    return run_ranks(parallel, size, folder, kwargs, path, size=2 * size)


KWARGS: list[dict[str, Any]] = [
    {},
    {"use_dora": True},
    {"init": "pissa"},
    {"modules_to_save": ["up", "norm"], "bias": "all"},
    {"target_modules": ["up", "down"], "target_slices": {"up": {"a": [0, 24]}, "down": {"a": [0, 5], "b": [7, 12]}}},
]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("kwargs", KWARGS, ids=str)
def test_parallel_matrices_train_as_on_one_process(tmp_path: Path, size: int, kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_dora") and Version(torch.__version__) < Version("2.13"):
        pytest.skip("torch 2.7 cannot split what DoRA computes, and says so")
    one = one_process(tmp_path, kwargs)
    first, *others = in_processes(size, tmp_path, kwargs)
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-4)
    for found in others:
        assert_same(found, first)


def test_processes_that_share_a_matrix_drop_the_same_features(tmp_path: Path) -> None:
    first, second = in_processes(1, tmp_path, {"dropout": 0.3})
    assert_same(second, first)


@pytest.mark.parametrize("size", [1, 2])
def test_they_resume_load_and_merge_anywhere(tmp_path: Path, size: int) -> None:
    whole = in_processes(size, tmp_path, {})[0]
    for found in in_processes(size, tmp_path / "b", {}, path_of(tmp_path, "parallel", 0)):
        assert_same(found, whole)
    file = path_of(tmp_path, "parallel", 1)
    assert_same(whole_state(built(file)), whole)
    merged = in_processes(size, tmp_path / "c", {"merge": "last"}, path_of(tmp_path, "parallel", 0))[0]
    one = one_process(tmp_path / "d", {"merge": "last"}, file)
    assert_same(merged, one)
    assert not torch.equal(merged["model.layers.0.up.weight"], pretrained()["layers.0.up.weight"])

"""Tensor parallelism: factors follow their weights."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from packaging.version import Version
from torch import Tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lora import load_adapter
from tests.support.ranks import run_ranks
from tests.support.sharded import LitNet, data, lora, pretrained, trainer_of, whole_state
from tests.training.test_sharded import Saves, assert_same, path_of

pytestmark = pytest.mark.processes

PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Parallel(LitNet):
    """Splits the matrices of its blocks, and shards them too if there are processes for it."""

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self.built()
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return
        for layer in self.model.layers:
            parallelize_module(layer, self.device_mesh["tensor_parallel"], PLAN)
        if self.device_mesh["data_parallel"].size() > 1:
            self.shard()


def parallel(data_size: int, folder: Path, kwargs: dict[str, Any], resumed: Path | None = None) -> dict[str, Tensor]:
    L.seed_everything(1, verbose=False)
    module = Parallel()
    torch.manual_seed(1 if resumed is None else 99)
    options: dict[str, Any] = {"use_distributed_sampler": False}
    if data_size:
        options |= {"devices": 2 * data_size, "strategy": ModelParallelStrategy(data_size, 2)}
    callbacks = [lora(**{"dropout": 0.0, **kwargs}), Saves(folder, str(data_size))]
    trainer_of("one", folder, callbacks, **options).fit(module, data(), data(), ckpt_path=resumed, weights_only=True)
    return whole_state(module)


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
    one = parallel(0, tmp_path, kwargs)
    first, *others = run_ranks(parallel, size, tmp_path, kwargs, size=2 * size)
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-4)
    for found in others:
        assert_same(found, first)


def test_processes_that_share_a_matrix_drop_the_same_features(tmp_path: Path) -> None:
    first, second = run_ranks(parallel, 1, tmp_path, {"dropout": 0.3})
    assert_same(second, first)


@pytest.mark.parametrize("size", [1, 2])
def test_they_resume_and_load_anywhere(tmp_path: Path, size: int) -> None:
    whole = run_ranks(parallel, size, tmp_path, {}, size=2 * size)[0]
    again = run_ranks(parallel, size, tmp_path / "b", {}, path_of(tmp_path, str(size), 0), size=2 * size)
    for found in again:
        assert_same(found, whole)
    module = LitNet()
    module.model = module.built()
    load_adapter(module, path_of(tmp_path, str(size), 1))
    assert_same(whole_state(module), whole)


@pytest.mark.parametrize("size", [1, 2])
def test_their_merge_is_that_of_one_process(tmp_path: Path, size: int) -> None:
    merged = run_ranks(parallel, size, tmp_path, {"merge": "last"}, size=2 * size)[0]
    one = parallel(0, tmp_path / "b", {"merge": "last"}, path_of(tmp_path, str(size), 1))
    assert_same(merged, one)
    assert not torch.equal(merged["model.layers.0.up.weight"], pretrained()["layers.0.up.weight"])

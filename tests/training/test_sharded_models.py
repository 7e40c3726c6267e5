"""Models that are built, sharded and trained in many ways, on shards."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from lightning_lora import BaseMismatchError, LoRACallback, LoRAConfig, inject_adapters
from tests.support.ranks import RankError, run_ranks
from tests.support.sharded import (
    InPairs,
    LitNet,
    Net,
    data,
    fully_shard,
    lora,
    pretrained,
    shard,
    strategy_of,
    trainer_of,
    whole_state,
)
from tests.training.test_sharded import assert_alike, assert_same, fit, fit_and_save, path_of

pytestmark = pytest.mark.processes


class Before(LitNet):
    """Shards its model before it belongs to the module."""

    def configure_model(self) -> None:
        if self.model is not None:
            return
        net = self.built()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard(net, self.device_mesh["data_parallel"])
        self.model = net


class Meta(LitNet):
    """Makes its model on the meta device, and loads it late."""

    def configure_model(self) -> None:
        if self.model is not None:
            return
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.model = self.built()
            return
        with torch.device("meta"):
            self.model = Net()
        self.shard()

    def on_fit_start(self) -> None:
        self.load()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":
            self.load()

    def load(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(self.model, pretrained(), options=options)


class Late(LitNet):
    """Loads its pretrained weights in on_fit_start."""

    def built(self) -> Net:
        return Net() if isinstance(self.trainer.strategy, ModelParallelStrategy) else super().built()

    on_fit_start = Meta.on_fit_start
    load = Meta.load


class Checkpointed(LitNet):
    """Computes its blocks again in the backward pass."""

    def built(self) -> Net:
        net = super().built()
        for number, layer in enumerate(net.layers):
            net.layers[number] = checkpoint_wrapper(layer)
        return net


class EachLinear(LitNet):
    """Shards each layer alone."""

    def shard(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for module in self.model.modules():
            if isinstance(module, nn.Linear):
                fully_shard(module, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Blocks(LitNet):
    """Leaves its head out of the shards."""

    def shard(self) -> None:
        for layer in self.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


BUILDS = [Before, Late, Checkpointed, EachLinear, Blocks]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.filterwarnings("ignore::lightning_lora.FreshLayerWarning")
def test_models_that_are_built_in_any_way_train_alike(tmp_path: Path, build: Any) -> None:
    assert_alike(tmp_path, build)


@pytest.mark.parametrize("build", [Meta, Late, Checkpointed])
def test_their_files_are_those_of_ddp(tmp_path: Path, build: Any) -> None:
    whole = run_ranks(fit_and_save, "sharded", tmp_path, build, {})[0]
    again = run_ranks(fit_and_save, "sharded", tmp_path / "b", build, {}, path_of(tmp_path, "sharded", 0))[0]
    assert_same(again, whole)
    plain = run_ranks(fit_and_save, "ddp", tmp_path / "c", LitNet, {}, path_of(tmp_path, "sharded", 0))[0]
    assert_same({name.replace("_checkpoint_wrapped_module.", ""): value for name, value in whole.items()}, plain)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"modules_to_save": ["head"]},
        {"modules_to_save": ["norm"], "target_modules": ["q"]},
        {"bias": "all"},
        {"use_dora": True, "dropout": 0.0},
        {"init": "pissa", "dropout": 0.0},
        {"init": "olora"},
        {"modules_to_save": ["head"], "use_dora": True, "dropout": 0.0},
        {"modules_to_save": ["head"], "init": "pissa"},
    ],
    ids=str,
)
def test_what_trains_beside_adapters_trains_alike(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    assert_alike(tmp_path, kwargs=kwargs)


def clipped(kind: str, folder: Path) -> dict[str, Tensor]:
    return fit(kind, folder, LitNet, {"gradient_clip_val": 0.1}, {"modules_to_save": ["head"], "bias": "lora_only"})


def test_clipping_takes_shards_and_adapters_together(tmp_path: Path) -> None:
    ddp, sharded = run_ranks(clipped, "ddp", tmp_path)[0], run_ranks(clipped, "sharded", tmp_path)[0]
    torch.testing.assert_close(sharded, ddp, rtol=1e-5, atol=1e-6)


class Fused(LitNet):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, foreach=True)


def test_foreach_optimizers_take_shards_and_adapters_together(tmp_path: Path) -> None:
    assert_alike(tmp_path, Fused, {"modules_to_save": ["head"]})
    assert_alike(tmp_path, Fused)


@pytest.mark.parametrize("kwargs", [{"modules_to_save": ["head"]}, {"use_dora": True}, {"init": "pissa"}], ids=str)
def test_they_resume_and_merge_alike(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    whole = run_ranks(fit_and_save, "sharded", tmp_path, LitNet, {**kwargs, "merge": "last"})[0]
    for written in ("sharded", "ddp"):
        if written == "ddp":
            assert_same(run_ranks(fit_and_save, "ddp", tmp_path, LitNet, {**kwargs, "merge": "last"})[0], whole)
        resumed = path_of(tmp_path, written, 0)
        again = run_ranks(fit_and_save, "sharded", tmp_path / "b", LitNet, {**kwargs, "merge": "last"}, resumed)[0]
        assert_same(again, whole)


def with_precision(kind: str, folder: Path, precision: Any) -> dict[str, Tensor]:
    return fit(kind, folder, LitNet, {"precision": precision}, {"modules_to_save": ["head"]})


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precisions_keep_what_they_keep_under_ddp(tmp_path: Path, precision: str) -> None:
    ddp, sharded = (run_ranks(with_precision, kind, tmp_path, precision)[0] for kind in ("ddp", "sharded"))
    assert {name: value.dtype for name, value in sharded.items()} == {name: v.dtype for name, v in ddp.items()}
    if precision == "bf16-true":
        assert sharded["model.layers.0.q.lora_A"].dtype == torch.float32
    torch.testing.assert_close(sharded, ddp, rtol=1e-4, atol=1e-5)


class Uneven(LitNet):
    """One process's batches leave a layer out."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0]
        for number, layer in enumerate(self.model.layers):
            if number == 0 or dist.get_rank() == 0:
                x = layer(x)
        return self.model.head(x).square().mean()

    def shard(self) -> None:
        fully_shard(self.model.layers[0], mesh=self.device_mesh["data_parallel"])


@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
def test_layer_that_one_process_leaves_out_trains(tmp_path: Path) -> None:
    state = assert_alike(tmp_path, Uneven)
    assert state["model.layers.1.q.lora_B"].any()


class Other(LitNet):
    """Another base: the last value of the last process's part differs."""

    def built(self) -> Net:
        net = super().built()
        with torch.no_grad():
            net.layers[1].down.weight[-1, -1] += 0.5
        return net


def refused(folder: Path, path: Path) -> str:
    module = Other()
    try:
        trainer_of("sharded", folder, [lora()]).fit(module, data(), data(), ckpt_path=path)
    except BaseMismatchError as error:
        return str(error)
    return ""


def test_wrong_base_is_refused_in_every_process(tmp_path: Path) -> None:
    run_ranks(fit_and_save, "sharded", tmp_path, LitNet, {})
    for message in run_ranks(refused, tmp_path, path_of(tmp_path, "sharded", 0)):
        assert "model.layers.1.down.weight" in message


class FailsAlone(LitNet):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if dist.get_rank() == 1 and index == 2:
            raise ValueError("alone")
        return super().training_step(batch, index)


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["head"]}], ids=str)
def test_process_that_fails_alone_ends_the_run(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    with pytest.raises(RankError, match="ValueError: alone"):
        run_ranks(fit, "sharded", tmp_path, FailsAlone, {}, kwargs)


class InjectsFirst(LitNet):
    def shard(self) -> None:
        inject_adapters(self.model, LoRAConfig(r=2, dropout=0.1))
        super().shard()


def test_adapters_that_were_sharded_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"StrategyError: 'model.layers.0.q.lora_A'.* were sharded with the base"):
        run_ranks(fit, "sharded", tmp_path, InjectsFirst, {}, {})


def adapted_before(folder: Path) -> bool:
    """Adapters from elsewhere stay out of the shards that configure_model makes later."""
    module = LitNet()
    module.model = module.built()
    inject_adapters(module, LoRAConfig(r=2, dropout=0.1))
    expected = copy.deepcopy(module.model.layers[0].q.lora_A)
    own = module.model

    def configure_model() -> None:
        shard(own, module.device_mesh["data_parallel"])

    module.configure_model = configure_model  # type: ignore[method-assign]
    trainer_of("sharded", folder, [lora()], max_steps=0).fit(module, data())
    assert isinstance(own.layers[0].q.lora_A, nn.Parameter) and type(own.layers[0].q.lora_A) is nn.Parameter
    return torch.equal(own.layers[0].q.lora_A, expected)


def test_adapters_from_before_stay_whole(tmp_path: Path) -> None:
    assert run_ranks(adapted_before, tmp_path) == [True, True]


def arguments_of_the_file(folder: Path, path: Path) -> dict[str, Tensor]:
    L.seed_everything(1, verbose=False)
    module = LitNet()
    trainer_of("sharded", folder, [LoRACallback(merge=False, exclude_modules=["head"])]).fit(
        module, data(), data(), ckpt_path=path
    )
    return whole_state(module)


def test_arguments_come_from_the_file(tmp_path: Path) -> None:
    whole = run_ranks(fit_and_save, "sharded", tmp_path, LitNet, {"r": 3, "exclude_modules": ["head"]})[0]
    assert_same(run_ranks(arguments_of_the_file, tmp_path / "b", path_of(tmp_path, "sharded", 0))[0], whole)


class Unused(LitNet):
    """A layer that no batch reaches."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.model.head(self.model.layers[0](batch[0])).square().mean()

    shard = Uneven.shard


def test_adapter_without_a_gradient_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"DeadAdapterWarning: The adapters of 'model.layers.1.q', .* no gradient"):
        run_ranks(fit, "sharded", tmp_path, Unused, {}, {})


class New(LitNet):
    """A layer that nobody has trained, in a pretrained model."""

    def built(self) -> Net:
        net = super().built()
        net.layers[1].up.reset_parameters()
        return net


def test_untrained_layer_is_named_on_shards(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"FreshLayerWarning: .*model.layers.1.up"):
        run_ranks(fit, "sharded", tmp_path, New, {}, {})


def in_four_processes(kind: str, folder: Path, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    options = {"devices": 4, "strategy": strategy_of(kind, 4)}
    return fit("one", folder, InPairs, options, kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["head"], "merge": "last"}], ids=str)
def test_base_that_is_sharded_in_groups_of_processes_trains_alike(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    ddp = run_ranks(in_four_processes, "ddp", tmp_path, kwargs, size=4)[0]
    for found in run_ranks(in_four_processes, "sharded", tmp_path, kwargs, size=4):
        torch.testing.assert_close(found, ddp, rtol=1e-5, atol=1e-6)  # four gradients are added in another order

"""FSDP2's ModelParallelStrategy, and DeepSpeed with ZeRO 1 and 2, train, store and merge to the bit what DDP does."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters, merge_adapters, unmerge_adapters
from lightning_lora.model.record import find_record
from tests.support import sharded
from tests.support import sharded_fits as fits
from tests.support.ranks import RankError, run_ranks
from tests.support.sharded import LitNet, Net, data, fully_shard, lora, pretrained, shard, trainer_of, whole_state
from tests.support.sharded_fits import State, assert_same, built, differing, fit_in_processes, message_of, path_of, read

if sharded.has_deepspeed:
    import tests.support.cpu_deepspeed  # noqa: F401  # here, and not in each process

pytestmark = pytest.mark.processes

needs_deepspeed = pytest.mark.skipif(not sharded.has_deepspeed, reason="needs deepspeed")
warns = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of DeepSpeed itself


def zero(*values: Any) -> Any:
    """A case of DeepSpeed's."""
    return pytest.param(*values, marks=[needs_deepspeed, warns])


class WarmsUp(LitNet):  # asks for the number of steps, so that Lightning starts the data loaders early
    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 8
        return super().configure_optimizers()


class Meta(LitNet):  # makes its model on the meta device, and loads it late
    def built(self) -> Net:
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            return super().built()
        with torch.device("meta"):
            return Net()

    def on_fit_start(self) -> None:
        self.load()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":
            self.load()

    def load(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(self.model, pretrained(), options=options)


class Checkpointed(LitNet):  # computes its blocks again in the backward pass
    def built(self) -> Net:
        net = super().built()
        for number, layer in enumerate(net.layers):
            net.layers[number] = checkpoint_wrapper(layer)
        return net


class Blocks(LitNet):  # leaves its head out of the shards
    def shard(self) -> None:
        for layer in self.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class Uneven(LitNet):  # one process's batches leave a layer out
    def loss(self, batch: list[Tensor]) -> Tensor:
        x = batch[0]
        for number, layer in enumerate(self.model.layers):
            if number == 0 or dist.get_rank() == 0:
                x = layer(x)
        return self.model.head(x).square().mean()

    def shard(self) -> None:
        fully_shard(self.model.layers[0], mesh=self.device_mesh["data_parallel"])


class WithNorm(LitNet):  # a norm whose statistics are those of each process's batches
    def built(self) -> Net:
        net = super().built()
        net.layers[1].norm = nn.BatchNorm1d(16)
        return net


class Llama(LitNet):  # a small Llama whose head is tied to its embedding
    def built(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
            model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
            for p in model.parameters():
                nn.init.normal_(p, mean=0.02, std=0.3)
            return model

    def shard(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)

    def loss(self, batch: list[Tensor]) -> Tensor:
        index = batch[0].abs().mul(9).long().clamp(max=31)
        return self.model(input_ids=index, labels=index).loss


HEAD = {"modules_to_save": ["head"]}
ALL = {**HEAD, "bias": "all", "use_dora": True}
NEAR, ROUNDED = {"rtol": 1e-5, "atol": 1e-6}, {"rtol": 1e-4, "atol": 1e-5}
DEAD = pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")


@pytest.mark.parametrize(
    ("kind", "build", "kwargs", "options"),
    [
        ("sharded", LitNet, {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        ("in one file", LitNet, {**HEAD, "init": "pissa"}, {}),
        ("sharded", LitNet, {**ALL, "dropout": 0.0}, {}),
        ("sharded", Blocks, {"bias": "all"}, {}),
        pytest.param("sharded", Uneven, {}, {}, marks=DEAD),
        ("sharded", WithNorm, {"modules_to_save": ["layers.1.norm"]}, {}),
        ("sharded", Llama, {"merge": "last"}, {}),
        zero("zero2", LitNet, {**ALL, "lr_scale": {"A": 2, "B": 8}}, {}),
        # up to rounding
        ("sharded", LitNet, {**HEAD, "bias": "lora_only"}, {"gradient_clip_val": 0.1, **NEAR}),
        ("sharded", LitNet, HEAD, {"precision": "bf16-true", **ROUNDED}),
        # four gradients are added in another order
        ("sharded", sharded.InPairs, {**HEAD, "merge": "last"}, {"devices": 4, **NEAR}),
        zero("zero1", LitNet, {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, **ROUNDED}),
    ],
)
def test_processes_train_and_store_what_ddp_does(
    tmp_path: Path, kind: str, build: Any, kwargs: Any, options: Any
) -> None:
    near = {name: options[name] for name in NEAR if name in options}
    options = {name: value for name, value in options.items() if name not in NEAR}
    expected = fit_in_processes("ddp", tmp_path, build, kwargs, **options)[0]
    for found in fit_in_processes(kind, tmp_path, build, kwargs, **options):
        torch.testing.assert_close(found, expected, **near or {"rtol": 0, "atol": 0})  # the dtypes too
    assert "precision" not in options or found["model.layers.0.q.lora_A"].dtype == torch.float32
    if near:
        return
    assert all(value.any() for name, value in expected.items() if name.endswith("lora_B"))
    if build is LitNet:
        file, of_ddp = (path_of(tmp_path, each, 1) for each in (kind, "ddp"))
        assert differing(file, of_ddp) == []
        assert abs(file.stat().st_size - of_ddp.stat().st_size) < 200
        assert not [name for name in read(file) if "['state_dict']" in name and name.endswith("q.weight']")]
        assert_same(whole_state(built(file)), expected)  # on one process


# Files


@pytest.mark.parametrize(
    ("written", "resumed", "build", "kwargs"),
    [
        ("sharded", "sharded", WarmsUp, {}),
        ("sharded", "sharded", Meta, {}),
        ("sharded", "ddp", Checkpointed, {}),
        ("ddp", "sharded", LitNet, {**HEAD, "init": "pissa", "merge": "last"}),
        ("sharded", "sharded", LitNet, {"use_dora": True, "lr_scale": 10, "merge": "last"}),
        zero("ddp", "zero2", LitNet, {}),
        zero("zero2", "sharded", LitNet, {}),
        zero("zero1", "ddp", LitNet, {"lr_scale": 10}),
    ],
)
def test_run_resumes_to_the_same_bits(tmp_path: Path, written: str, resumed: str, build: Any, kwargs: Any) -> None:
    whole = fit_in_processes(written, tmp_path, build, kwargs)[0]
    if resumed == "ddp" != written:  # which knows nothing of how the model was built
        build = LitNet
        whole = {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in whole.items()}
    for found in fit_in_processes(resumed, tmp_path / "b", build, kwargs, path_of(tmp_path, written, 0)):
        assert_same(found, whole)
    assert not differing(path_of(tmp_path / "b", resumed, 1), path_of(tmp_path, written, 1), "optimizer")


def evaluated(kind: str, folder: Path) -> tuple[list[float], list[bool], State]:
    """Evaluate a plain model, a full checkpoint and adapters of it, which come from a file alone."""
    L.seed_everything(1, verbose=False)
    full, adapters = folder / "full.ckpt", folder / "adapters.ckpt"
    for path, callbacks in ((full, []), (adapters, [lora(r=3, dropout=0.0)])):
        t = trainer_of("ddp", folder, callbacks, max_epochs=1)
        t.fit(LitNet(), data())
        t.save_checkpoint(path)
    module, numbers, plain = LitNet(), [], []
    for path in (None, full, adapters, None):
        if path == adapters:
            module = LitNet()
        t = trainer_of(kind, folder, [LoRACallback()])
        (losses,) = t.test(module, data(), ckpt_path=path, verbose=False, weights_only=True)
        numbers.append(losses["loss"])
        plain.append(find_record(module) is None and all(p.requires_grad for p in module.parameters()))
    return numbers, plain, whole_state(module)


@pytest.mark.filterwarnings("ignore:.*Using `DistributedSampler`:UserWarning")
def test_evaluation_on_shards_adds_what_a_file_has(tmp_path: Path) -> None:
    of_ddp = run_ranks(evaluated, "ddp", tmp_path / "ddp")[0]
    for numbers, plain, state in run_ranks(evaluated, "sharded", tmp_path / "sharded"):
        assert numbers == pytest.approx(of_ddp[0]) and len(set(numbers)) == 3
        assert plain == of_ddp[1] == [True, True, False, False]
        assert_same(state, of_ddp[2])


def whole_life(kind: str, folder: Path) -> tuple[State, list[str], State, State, list[float]]:
    """Fit with a merge, evaluate, evaluate a file, unmerge, fit again."""
    L.seed_everything(1, verbose=False)
    module, scores = LitNet(), []
    best = ModelCheckpoint(folder / kind, monitor="loss", filename="best")
    t = trainer_of(kind, folder, [lora(merge="best"), best], enable_checkpointing=True)
    t.fit(module, data(), data())
    merged, classes = whole_state(module), sorted({type(m).__name__ for m in module.modules()})
    scores.append(t.validate(module, data(), verbose=False)[0]["loss"])
    assert_same(whole_state(module), merged)
    scores.append(t.validate(module, data(), ckpt_path=best.best_model_path, verbose=False)[0]["loss"])
    scores.append(float(best.best_model_score))
    assert_same(whole_state(module), merged)
    unmerge_adapters(module)
    base = {name: value for name, value in whole_state(module).items() if "lora" not in name}
    merge_adapters(module)
    assert_same(whole_state(module), merged)
    trainer_of(kind, folder, [lora(merge="last")], max_epochs=1).fit(module, data(), data())
    return merged, classes, base, whole_state(module), scores


@pytest.mark.parametrize("kind", ["sharded", zero("zero2")])
def test_merge_is_that_of_ddp_and_of_one_process(tmp_path: Path, kind: str) -> None:
    merged, classes, base, second, scores = run_ranks(whole_life, kind, tmp_path)[1]
    of_ddp = run_ranks(whole_life, "ddp", tmp_path)[0]
    assert_same(merged, of_ddp[0])
    assert_same(base, {f"model.{name}": value for name, value in pretrained().items()})
    assert_same(second, of_ddp[3])
    assert scores == pytest.approx(of_ddp[4], rel=1e-5)
    assert not [name for name in classes if "LoRA" in name]
    module = built(tmp_path / kind / "best.ckpt")
    merge_adapters(module)
    assert scores[0] == pytest.approx(scores[2], rel=1e-5)
    assert_same(whole_state(module), merged)


def without_the_callback(kind: str, folder: Path) -> list[tuple[State, State]]:
    """Fit with the callback, and then without it: the merged module and a new one."""
    states, modules = [], [LitNet(), LitNet()]
    t = trainer_of(kind, folder, [callback := lora(merge="last")], max_epochs=1)
    t.fit(modules[0], data())
    t.callbacks.remove(callback)  # type: ignore[attr-defined]
    for module in modules:
        t.fit_loop.max_epochs += 1  # type: ignore[operator]
        before = whole_state(module) if module.model else {f"model.{key}": value for key, value in pretrained().items()}
        t.fit(module, data())
        states.append((before, whole_state(module)))
    return states


@pytest.mark.parametrize("kind", ["sharded", zero("zero2")])
def test_without_the_callback_all_weights_train(tmp_path: Path, kind: str) -> None:
    for states in run_ranks(without_the_callback, kind, tmp_path):
        for before, after in states:
            assert before.keys() == after.keys() and not any(torch.equal(after[name], before[name]) for name in before)


class FailsAlone(LitNet):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if dist.get_rank() == 1 and index == 2:
            raise ValueError("alone")
        return super().training_step(batch, index)


class InjectsFirst(LitNet):
    def shard(self) -> None:
        inject_adapters(self.model, LoRAConfig(r=2, dropout=0.1))
        super().shard()


class Unused(LitNet):  # a layer that no batch reaches
    def loss(self, batch: list[Tensor]) -> Tensor:
        return self.model.head(self.model.layers[0](batch[0])).square().mean()

    shard = Uneven.shard


class New(LitNet):  # a layer that nobody has trained, in a pretrained model
    def built(self) -> Net:
        net = super().built()
        net.layers[1].up.reset_parameters()
        return net


class Whole(LitNet):
    def shard(self) -> None:
        pass


NO_GRADIENT = r"DeadAdapterWarning: The adapters of 'model.layers.1.q', .* no gradient"


@pytest.mark.parametrize(
    ("kind", "build", "kwargs", "match"),
    [
        ("sharded", FailsAlone, HEAD, "ValueError: alone"),
        ("sharded", InjectsFirst, {}, r"StrategyError: 'model.layers.0.q.lora_A'.* were sharded with the base"),
        ("sharded", Unused, {}, NO_GRADIENT),
        zero("zero2", Unused, {}, NO_GRADIENT),
        ("sharded", Whole, {}, "LoRAWarning: Nothing of Whole is sharded"),
        ("sharded", New, {}, r"FreshLayerWarning: .*model.layers.1.up"),
    ],
)
def test_what_is_wrong_is_named_and_ends_the_run(
    tmp_path: Path, kind: str, build: Any, kwargs: Any, match: str
) -> None:
    with pytest.raises(RankError, match=match):
        fit_in_processes(kind, tmp_path, build, kwargs)


class OtherBase(LitNet):  # the last value of the last process's part differs
    def built(self) -> Net:
        net = super().built()
        with torch.no_grad():
            net.layers[1].down.weight[-1, -1] += 0.5
        return net


def refused(kind: str, folder: Path, build: Callable[[], LitNet], kwargs: dict[str, Any], path: Path) -> str:
    module = build()
    message = message_of(trainer_of(kind, folder, [lora(**kwargs)]).fit, module, data(), data(), ckpt_path=path)
    assert kind == "sharded" or not [name for name in module.state_dict() if "lora" in name]
    return message


UNEXPECTED = {"exclude_modules": ["head"]}


@pytest.mark.parametrize(
    ("kind", "build", "kwargs", "error", "text"),
    [
        ("sharded", OtherBase, {}, "BaseMismatchError", "model.layers.1.down.weight"),
        zero("zero2", OtherBase, {}, "BaseMismatchError", "model.layers.1.down.weight"),
        zero("zero2", LitNet, UNEXPECTED, "AdapterMismatchError", "unexpected 'model.head.lora_A'"),
    ],
)
def test_file_of_another_run_is_refused_in_every_process(
    tmp_path: Path, kind: str, build: Any, kwargs: dict[str, Any], error: str, text: str
) -> None:
    fit_in_processes(kind, tmp_path)
    for message in run_ranks(refused, kind, tmp_path, build, kwargs, path_of(tmp_path, kind, 0)):
        assert message.startswith(error) and text in message


def adapted_before(folder: Path) -> bool:
    """Adapters from elsewhere stay out of the shards that configure_model makes later."""
    module = LitNet()
    own = module.model = module.built()
    inject_adapters(module, LoRAConfig(r=2, dropout=0.1))
    expected = copy.deepcopy(own.layers[0].q.lora_A)
    module.configure_model = lambda: shard(own, module.device_mesh["data_parallel"])  # type: ignore[method-assign]
    trainer_of("sharded", folder, [lora()], max_steps=0).fit(module, data())
    assert type(own.layers[0].q.lora_A) is nn.Parameter
    return torch.equal(own.layers[0].q.lora_A, expected)


def test_adapters_from_before_stay_whole(tmp_path: Path) -> None:
    assert run_ranks(adapted_before, tmp_path) == [True, True]


# Tensor parallelism: factors follow their weights

PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Parallel(LitNet):  # splits the matrices of its blocks, and shards them too if there are processes for it
    def shard(self) -> None:
        for layer in self.model.layers:
            parallelize_module(layer, self.device_mesh["tensor_parallel"], PLAN)
        if self.device_mesh["data_parallel"].size() > 1:
            super().shard()


def in_one_process(folder: Path, kwargs: dict[str, Any], path: Path | None = None) -> State:
    return fits.fit("one", folder, Parallel, {"dropout": 0.0, **kwargs}, path, use_distributed_sampler=False)


def parallel(size: int, folder: Path, kwargs: dict[str, Any], path: Path | None = None) -> State:
    options: dict[str, Any] = {"devices": 2 * size, "strategy": ModelParallelStrategy(size, 2)}
    kwargs = {"dropout": 0.0, **kwargs}
    return fits.fit("parallel", folder, Parallel, kwargs, path, use_distributed_sampler=False, **options)


def in_processes(size: int, folder: Path, kwargs: dict[str, Any], path: Path | None = None) -> list[State]:
    return run_ranks(parallel, size, folder, kwargs, path, size=2 * size)


KWARGS: list[dict[str, Any]] = [
    {"use_dora": True},
    {"modules_to_save": ["up", "norm"], "bias": "all"},
    {"target_modules": ["up", "down"], "target_slices": {"up": {"a": [0, 24]}, "down": {"a": [0, 5], "b": [7, 12]}}},
]


@pytest.mark.parametrize(("size", "kwargs"), [(2, {}), *((1, kwargs) for kwargs in KWARGS)], ids=str)
def test_parallel_matrices_train_as_in_one_process(tmp_path: Path, size: int, kwargs: dict[str, Any]) -> None:
    if kwargs.get("use_dora") and Version(torch.__version__) < Version("2.13"):
        pytest.skip("torch 2.7 cannot split what DoRA computes, and says so")
    one = in_one_process(tmp_path, kwargs)
    first, *others = in_processes(size, tmp_path, kwargs)
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-4)
    for found in others:
        assert_same(found, first)


def test_processes_that_share_a_matrix_drop_the_same_features(tmp_path: Path) -> None:
    first, second = in_processes(1, tmp_path, {"dropout": 0.3})
    assert_same(second, first)


def test_they_resume_load_and_merge_anywhere(tmp_path: Path) -> None:
    whole = in_processes(1, tmp_path, {})[0]
    for found in in_processes(1, tmp_path / "b", {}, path_of(tmp_path, "parallel", 0)):
        assert_same(found, whole)
    file = path_of(tmp_path, "parallel", 1)
    assert_same(whole_state(built(file)), whole)
    merged = in_processes(1, tmp_path / "c", {"merge": "last"}, path_of(tmp_path, "parallel", 0))[0]
    one = in_one_process(tmp_path / "d", {"merge": "last"}, file)
    assert_same(merged, one)
    assert not torch.equal(merged["model.layers.0.up.weight"], pretrained()["layers.0.up.weight"])

"""FSDP2's ModelParallelStrategy, and DeepSpeed with ZeRO 1 and 2, train, store and merge to the bit what DDP does."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    inject_adapters,
    merge_adapters,
    unmerge_adapters,
)
from lightning_lora.model.records import find_record
from tests.support import sharded
from tests.support import sharded_fits as fits
from tests.support.messages import lines_with
from tests.support.parameters import is_base, names_that_differ
from tests.support.ranks import RankError, run_ranks
from tests.support.sharded import (
    LitNet,
    Net,
    data,
    fully_shard,
    lora,
    pretrained,
    pretrained_in_module,
    shard,
    trainer_of,
    whole_state,
)
from tests.support.sharded_fits import (
    State,
    assert_same,
    built,
    differing,
    fit_in_processes,
    message_of,
    path_of,
    read,
)

if sharded.has_deepspeed:
    import tests.support.cpu_deepspeed  # noqa: F401  # here, and not in each process

pytestmark = pytest.mark.processes

needs_deepspeed = pytest.mark.skipif(
    not sharded.has_deepspeed, reason="needs deepspeed"
)
# of DeepSpeed itself
warns = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning"
)


def zero(*values: Any) -> Any:
    """A case of DeepSpeed's."""
    return pytest.param(*values, marks=[needs_deepspeed, warns])


class WarmsUp(LitNet):
    """Asks for the number of steps, so that Lightning starts the data loaders early."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 8
        return super().configure_optimizers()


class Meta(LitNet):
    """Makes its model on the meta device, and loads it late."""

    def is_sharded(self) -> bool:
        return isinstance(self.trainer.strategy, ModelParallelStrategy)

    def built(self) -> Net:
        if not self.is_sharded():
            return super().built()
        with torch.device("meta"):
            return Net()

    def on_fit_start(self) -> None:
        self.load()

    def on_validation_start(self) -> None:
        if self.trainer.state.fn != "fit":
            self.load()

    def load(self) -> None:
        if self.is_sharded():
            options = StateDictOptions(full_state_dict=True, strict=False)
            set_model_state_dict(self.model, pretrained(), options=options)


class Checkpointed(LitNet):
    """Computes its blocks again in the backward pass."""

    def built(self) -> Net:
        net = super().built()
        for number, layer in enumerate(net.layers):
            net.layers[number] = checkpoint_wrapper(layer)
        return net


class Blocks(LitNet):
    """Leaves its head out of the shards."""

    def shard(self) -> None:
        for layer in self.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


class FirstBlock(LitNet):
    """Shards its first block alone."""

    def shard(self) -> None:
        fully_shard(self.model.layers[0], mesh=self.device_mesh["data_parallel"])


class Uneven(FirstBlock):
    """One process's batches leave a layer out."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        first, second = self.model.layers
        x = first(batch[0])
        if dist.get_rank() == 0:
            x = second(x)
        return self.model.head(x).square().mean()


class WithNorm(LitNet):
    """A norm whose statistics are those of each process's batches."""

    def built(self) -> Net:
        net = super().built()
        net.layers[1].norm = nn.BatchNorm1d(16)
        return net


class Llama(LitNet):
    """A small Llama whose head is tied to its embedding."""

    def built(self) -> Any:
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            model = LlamaForCausalLM(config)
            for p in model.parameters():
                nn.init.normal_(p, mean=0.02, std=0.3)
            return model

    def shard(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        shard(self.model, self.model.model.layers, mesh)

    def loss(self, batch: list[Tensor]) -> Tensor:
        index = batch[0].abs().mul(9).long().clamp(max=31)
        return self.model(input_ids=index, labels=index).loss


HEAD = {"modules_to_save": ["head"]}
ALL = {**HEAD, "bias": "all", "use_dora": True}
CLIPPED = {"gradient_clip_val": 0.1}
ACCUMULATED = {"accumulate_grad_batches": 2, **CLIPPED}

# How near what is computed in another order comes
NEAR = {"rtol": 1e-5, "atol": 1e-6}
ROUNDED = {"rtol": 1e-4, "atol": 1e-5}
SAME_BITS = {"rtol": 0.0, "atol": 0.0}


@pytest.mark.parametrize(
    ("kind", "build", "kwargs", "options"),
    [
        ("sharded", LitNet, {}, ACCUMULATED),
        ("in one file", LitNet, {**HEAD, "init": "pissa"}, {}),
        ("sharded", LitNet, {**ALL, "dropout": 0.0}, {}),
        ("sharded", Blocks, {"bias": "all"}, {}),
        pytest.param(
            "sharded",
            Uneven,
            {},
            {},
            marks=pytest.mark.filterwarnings(
                "ignore::lightning_lora.DeadAdapterWarning"
            ),
        ),
        ("sharded", WithNorm, {"modules_to_save": ["layers.1.norm"]}, {}),
        ("sharded", Llama, {"merge": "last"}, {}),
        zero("zero2", LitNet, {**ALL, "lr_scale": {"A": 2, "B": 8}}, {}),
    ],
)
def test_processes_train_and_store_what_ddp_does(
    tmp_path: Path, kind: str, build: Any, kwargs: Any, options: Any
) -> None:
    expected = fit_in_processes("ddp", tmp_path, build, kwargs, **options)[0]
    for found in fit_in_processes(kind, tmp_path, build, kwargs, **options):
        torch.testing.assert_close(found, expected, **SAME_BITS)  # the dtypes too
    updates = lines_with("lora_B", expected)
    assert all(expected[name].any() for name in updates)
    if build is LitNet:
        file = path_of(tmp_path, kind, 1)
        of_ddp = path_of(tmp_path, "ddp", 1)
        assert differing(file, of_ddp) == []
        assert abs(file.stat().st_size - of_ddp.stat().st_size) < 200
        in_state = lines_with("['state_dict']", read(file))
        assert lines_with("q.weight']", in_state) == []
        assert_same(whole_state(built(file)), expected)  # on one process


@pytest.mark.parametrize(
    ("kind", "build", "kwargs", "options", "near"),
    [
        ("sharded", LitNet, {**HEAD, "bias": "lora_only"}, CLIPPED, NEAR),
        ("sharded", LitNet, HEAD, {"precision": "bf16-true"}, ROUNDED),
        # four gradients are added in another order
        ("sharded", sharded.InPairs, {**HEAD, "merge": "last"}, {"devices": 4}, NEAR),
        zero("zero1", LitNet, {}, ACCUMULATED, ROUNDED),
    ],
)
def test_processes_train_what_ddp_does_up_to_rounding(
    tmp_path: Path, kind: str, build: Any, kwargs: Any, options: Any, near: Any
) -> None:
    expected = fit_in_processes("ddp", tmp_path, build, kwargs, **options)[0]
    for found in fit_in_processes(kind, tmp_path, build, kwargs, **options):
        torch.testing.assert_close(found, expected, **near)
        if "precision" in options:
            assert found["model.layers.0.q.lora_A"].dtype == torch.float32


# Files


@pytest.mark.parametrize(
    ("written", "resumed", "build", "kwargs"),
    [
        ("sharded", "sharded", WarmsUp, {}),
        ("sharded", "sharded", Meta, {}),
        ("sharded", "ddp", Checkpointed, {}),
        ("ddp", "sharded", LitNet, {**HEAD, "init": "pissa", "merge": "last"}),
        (
            "sharded",
            "sharded",
            LitNet,
            {"use_dora": True, "lr_scale": 10, "merge": "last"},
        ),
        zero("ddp", "zero2", LitNet, {}),
        zero("zero2", "sharded", LitNet, {}),
        zero("zero1", "ddp", LitNet, {"lr_scale": 10}),
    ],
)
def test_run_resumes_to_the_same_bits(
    tmp_path: Path, written: str, resumed: str, build: Any, kwargs: Any
) -> None:
    whole = fit_in_processes(written, tmp_path, build, kwargs)[0]
    if resumed == "ddp":  # which knows nothing of how the model was built
        build = LitNet
        whole = {
            name.replace("_checkpoint_wrapped_module.", ""): value
            for name, value in whole.items()
        }
    first = path_of(tmp_path, written, 0)
    for found in fit_in_processes(resumed, tmp_path / "b", build, kwargs, first):
        assert_same(found, whole)
    last = path_of(tmp_path, written, 1)
    last_again = path_of(tmp_path / "b", resumed, 1)
    assert differing(last_again, last, "optimizer") == []


class ReadsAhead(DataLoader[Any]):
    """A loader that draws its order when it begins, as one with workers does."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__()))


def shuffled_ahead() -> ReadsAhead:
    return ReadsAhead(data().dataset, batch_size=4, shuffle=True)


def test_data_that_begin_before_the_checkpoint_is_loaded_begin_again_in_its_epoch(
    tmp_path: Path,
) -> None:
    def run(folder: Path, path: Path | None) -> State:
        states = fit_in_processes(
            "sharded", folder, WarmsUp, {}, path, train=shuffled_ahead
        )
        return states[0]

    whole = run(tmp_path, None)
    resumed = run(tmp_path / "b", path_of(tmp_path, "sharded", 0))
    assert_same(resumed, whole)


@dataclass
class Evaluations:
    """What tests of a plain model, a full checkpoint, adapters of it and once more those give."""

    losses: list[float] = field(default_factory=list)
    is_plain: list[bool] = field(default_factory=list)
    state: State = field(default_factory=dict)


def write_files(folder: Path) -> tuple[Path, Path]:
    """A full checkpoint, and one of adapters."""
    files = folder / "full.ckpt", folder / "adapters.ckpt"
    for file, callbacks in zip(files, ([], [lora(r=3, dropout=0.0)]), strict=True):
        t = trainer_of("ddp", folder, callbacks, max_epochs=1)
        t.fit(LitNet(), data())
        t.save_checkpoint(file)
    return files


def evaluated(kind: str, folder: Path) -> Evaluations:
    """Evaluate a plain model, a full checkpoint and adapters of it, which come from a file alone."""
    L.seed_everything(1, verbose=False)
    full, adapters = write_files(folder)
    found = Evaluations()
    plain = LitNet()
    adapted = LitNet()
    for module, path in (
        (plain, None),
        (plain, full),
        (adapted, adapters),
        (adapted, None),
    ):
        t = trainer_of(kind, folder, [LoRACallback()])
        (losses,) = t.test(
            module, data(), ckpt_path=path, verbose=False, weights_only=True
        )
        found.losses.append(losses["loss"])
        all_train = all(p.requires_grad for p in module.parameters())
        found.is_plain.append(find_record(module) is None and all_train)
    found.state = whole_state(adapted)
    return found


@pytest.mark.filterwarnings("ignore:.*Using `DistributedSampler`:UserWarning")
def test_evaluation_on_shards_adds_what_a_file_has(tmp_path: Path) -> None:
    of_ddp = run_ranks(evaluated, "ddp", tmp_path / "ddp")[0]
    assert of_ddp.is_plain == [True, True, False, False]
    for found in run_ranks(evaluated, "sharded", tmp_path / "sharded"):
        assert found.losses == pytest.approx(of_ddp.losses)
        assert len(set(found.losses)) == 3
        assert found.is_plain == of_ddp.is_plain
        assert_same(found.state, of_ddp.state)


@dataclass
class Life:
    """What a module has in the course of its life."""

    merged: State
    classes: set[str]
    base: State
    second: State
    losses: list[float]


def whole_life(kind: str, folder: Path) -> Life:
    """Fit with a merge, evaluate, evaluate a file, unmerge, fit again."""
    L.seed_everything(1, verbose=False)
    module = LitNet()
    best = ModelCheckpoint(folder / kind, monitor="loss", filename="best")
    t = trainer_of(kind, folder, [lora(merge="best"), best], enable_checkpointing=True)
    t.fit(module, data(), data())
    merged = whole_state(module)
    classes = {type(inner).__name__ for inner in module.modules()}
    (validated,) = t.validate(module, data(), verbose=False)
    assert_same(whole_state(module), merged)
    (from_file,) = t.validate(
        module, data(), ckpt_path=best.best_model_path, verbose=False
    )
    assert_same(whole_state(module), merged)
    unmerge_adapters(module)
    unmerged = whole_state(module)
    base = {name: unmerged[name] for name in unmerged if is_base(name)}
    merge_adapters(module)
    assert_same(whole_state(module), merged)
    again = trainer_of(kind, folder, [lora(merge="last")], max_epochs=1)
    again.fit(module, data(), data())
    assert best.best_model_score is not None
    losses = [validated["loss"], from_file["loss"], float(best.best_model_score)]
    return Life(merged, classes, base, whole_state(module), losses)


@pytest.mark.parametrize("kind", ["sharded", zero("zero2")])
def test_merge_is_that_of_ddp_and_of_one_process(tmp_path: Path, kind: str) -> None:
    found = run_ranks(whole_life, kind, tmp_path)[1]
    of_ddp = run_ranks(whole_life, "ddp", tmp_path)[0]
    assert_same(found.merged, of_ddp.merged)
    assert_same(found.base, pretrained_in_module())
    assert_same(found.second, of_ddp.second)
    assert found.losses == pytest.approx(of_ddp.losses, rel=1e-5)
    assert lines_with("LoRA", found.classes) == []
    module = built(tmp_path / kind / "best.ckpt")
    merge_adapters(module)
    validated, _, score = found.losses
    assert validated == pytest.approx(score, rel=1e-5)
    assert_same(whole_state(module), found.merged)


def without_the_callback(kind: str, folder: Path) -> list[tuple[State, State]]:
    """Fit with the callback, and then without it: the merged module and a new one.

    Their states before and after.
    """
    merged = LitNet()
    new = LitNet()
    callback = lora(merge="last")
    t = trainer_of(kind, folder, [callback], max_epochs=1)
    t.fit(merged, data())
    t.callbacks.remove(callback)  # type: ignore[attr-defined]
    states = []
    for module, before in (
        (merged, whole_state(merged)),
        (new, pretrained_in_module()),
    ):
        t.fit_loop.max_epochs += 1  # type: ignore[operator]
        t.fit(module, data())
        states.append((before, whole_state(module)))
    return states


@pytest.mark.parametrize("kind", ["sharded", zero("zero2")])
def test_without_the_callback_all_weights_train(tmp_path: Path, kind: str) -> None:
    for states in run_ranks(without_the_callback, kind, tmp_path):
        for before, after in states:
            assert before.keys() == after.keys()
            assert names_that_differ(before, after) == list(before)


# What is wrong


class FailsAlone(LitNet):
    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        if dist.get_rank() == 1 and index == 2:
            raise ValueError("alone")
        return super().training_step(batch, index)


class InjectsFirst(LitNet):
    def shard(self) -> None:
        inject_adapters(self.model, LoRAConfig(r=2, dropout=0.1))
        super().shard()


class Unused(FirstBlock):
    """A layer that no batch reaches."""

    def loss(self, batch: list[Tensor]) -> Tensor:
        x = self.model.layers[0](batch[0])
        return self.model.head(x).square().mean()


class New(LitNet):
    """A layer that nobody has trained, in a pretrained model."""

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
        (
            "sharded",
            InjectsFirst,
            {},
            r"StrategyError: 'model.layers.0.q.lora_A'.* were sharded with the base",
        ),
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


class OtherBase(LitNet):
    """The last value of the last process's part differs."""

    def built(self) -> Net:
        net = super().built()
        net.layers[1].down.weight.data[-1, -1] += 0.5
        return net


def refused(
    kind: str,
    folder: Path,
    build: Callable[[], LitNet],
    kwargs: dict[str, Any],
    path: Path,
) -> str:
    module = build()
    t = trainer_of(kind, folder, [lora(**kwargs)])
    message = message_of(t.fit, module, data(), data(), ckpt_path=path)
    if kind != "sharded":
        assert lines_with("lora", module.state_dict()) == []
    return message


@pytest.mark.parametrize(
    ("kind", "build", "kwargs", "error", "text"),
    [
        ("sharded", OtherBase, {}, "BaseMismatchError", "model.layers.1.down.weight"),
        zero("zero2", OtherBase, {}, "BaseMismatchError", "model.layers.1.down.weight"),
        zero(
            "zero2",
            LitNet,
            {"exclude_modules": ["head"]},
            "AdapterMismatchError",
            "unexpected 'model.head.lora_A'",
        ),
    ],
)
def test_file_of_another_run_is_refused_in_every_process(
    tmp_path: Path, kind: str, build: Any, kwargs: dict[str, Any], error: str, text: str
) -> None:
    fit_in_processes(kind, tmp_path)
    file = path_of(tmp_path, kind, 0)
    for message in run_ranks(refused, kind, tmp_path, build, kwargs, file):
        assert message.startswith(error)
        assert text in message


class AdaptedBefore(LitNet):
    """Its model has adapters from elsewhere, before ``configure_model`` shards it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = self.built()
        inject_adapters(self, LoRAConfig(r=2, dropout=0.1))

    def configure_model(self) -> None:
        shard(self.model, self.model.layers, self.device_mesh["data_parallel"])


def adapted_before(folder: Path) -> bool:
    """Adapters from elsewhere stay out of the shards that configure_model makes later."""
    module = AdaptedBefore()
    layer = module.model.layers[0].q
    expected = copy.deepcopy(layer.lora_A)
    t = trainer_of("sharded", folder, [lora()], max_steps=0)
    t.fit(module, data())
    assert type(layer.lora_A) is nn.Parameter
    return torch.equal(layer.lora_A, expected)


def test_adapters_from_before_stay_whole(tmp_path: Path) -> None:
    assert run_ranks(adapted_before, tmp_path) == [True, True]


# Tensor parallelism: factors follow their weights

PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


class Parallel(LitNet):
    """Splits the matrices of its blocks, and shards them too if there are processes for it."""

    def shard(self) -> None:
        for layer in self.model.layers:
            parallelize_module(layer, self.device_mesh["tensor_parallel"], PLAN)
        if self.device_mesh["data_parallel"].size() > 1:
            super().shard()


def in_one_process(
    folder: Path, kwargs: dict[str, Any], path: Path | None = None
) -> State:
    kwargs = {"dropout": 0.0, **kwargs}
    return fits.fit(
        "one", folder, Parallel, kwargs, path, use_distributed_sampler=False
    )


def parallel(
    size: int, folder: Path, kwargs: dict[str, Any], path: Path | None = None
) -> State:
    kwargs = {"dropout": 0.0, **kwargs}
    return fits.fit(
        "parallel",
        folder,
        Parallel,
        kwargs,
        path,
        use_distributed_sampler=False,
        devices=2 * size,
        strategy=ModelParallelStrategy(size, 2),
    )


def in_processes(
    size: int, folder: Path, kwargs: dict[str, Any], path: Path | None = None
) -> list[State]:
    """What each of two processes, or of two times ``size``, has."""
    return run_ranks(parallel, size, folder, kwargs, path, size=2 * size)


SLICES = {"up": {"a": [0, 24]}, "down": {"a": [0, 5], "b": [7, 12]}}


@pytest.mark.parametrize(
    ("size", "kwargs"),
    [
        (2, {}),
        (1, {"use_dora": True}),
        (1, {"modules_to_save": ["up", "norm"], "bias": "all"}),
        (1, {"target_modules": ["up", "down"], "target_slices": SLICES}),
    ],
    ids=str,
)
def test_parallel_matrices_train_as_in_one_process(
    tmp_path: Path, size: int, kwargs: dict[str, Any]
) -> None:
    if "use_dora" in kwargs and Version(torch.__version__) < Version("2.13"):
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
    first = path_of(tmp_path, "parallel", 0)
    last = path_of(tmp_path, "parallel", 1)
    for found in in_processes(1, tmp_path / "b", {}, first):
        assert_same(found, whole)
    assert_same(whole_state(built(last)), whole)
    merged = in_processes(1, tmp_path / "c", {"merge": "last"}, first)[0]
    one = in_one_process(tmp_path / "d", {"merge": "last"}, last)
    assert_same(merged, one)
    base = pretrained()["layers.0.up.weight"]
    assert not torch.equal(merged["model.layers.0.up.weight"], base)

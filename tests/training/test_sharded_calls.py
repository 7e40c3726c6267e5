"""Calls on a model while it is sharded, and what is refused there."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    AdapterFileError,
    AdapterStateError,
    ConfigError,
    LoRACallback,
    LoRAError,
    LoRAWarning,
    StrategyError,
    TargetError,
    adapter_state_dict,
    disable_adapters,
    export_peft,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    save_merged,
    summarize,
    unmerge_adapters,
)
from tests.support.cases import StopError, held
from tests.support.models import needs_averaging
from tests.support.ranks import run_ranks
from tests.support.sharded import LitNet, data, fully_shard, lora, pretrained, trainer_of, whole_state
from tests.training.test_sharded import Saves, assert_alike, assert_same, path_of

pytestmark = pytest.mark.processes

X = torch.arange(64.0).reshape(4, 16).sin()


def fitted(folder: Path, kind: str = "sharded", **kwargs: Any) -> LitNet:
    L.seed_everything(1, verbose=False)
    module = LitNet()
    trainer_of(kind, folder, [lora(**kwargs)], max_epochs=1).fit(module, data())
    return module.eval()


def message_of(error: type[Exception], call: Callable[..., Any], *args: Any) -> str:
    try:
        call(*args)
    except error as found:
        return str(found)
    return ""


def files(folder: Path, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    module = fitted(folder, **kwargs)
    save_adapter(module, folder / "a.safetensors")
    assert load_file(folder / "a.safetensors").keys() == adapter_state_dict(module).keys()
    export_peft(module, folder / f"peft-{dist.get_rank()}")
    trained = whole_state(module)
    again = LitNet()
    trainer_of("sharded", folder, [lora(**kwargs)], max_steps=0).fit(again, data())
    load_adapter(again, folder / "a.safetensors")
    assert_same(whole_state(again), trained)
    with torch.no_grad():
        return trained, adapter_state_dict(again), module.model(X)


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["head"]}, {"use_dora": True, "dropout": 0.0}], ids=str)
def test_files_of_a_sharded_model_are_read_on_one_device(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    (trained, state, output), other = run_ranks(files, tmp_path, kwargs)
    assert not [name for name, value in state.items() if type(value) is not Tensor and type(value) is not nn.Parameter]
    for source in ("a.safetensors", "peft-0", "peft-1"):
        module = LitNet()
        module.model = module.built()
        load_adapter(module, tmp_path / source)
        assert_same({name: value for name, value in whole_state(module).items() if name in state}, state)
        assert_same(whole_state(module), trained)
        torch.testing.assert_close(module.eval().model(X), output)
    torch.testing.assert_close(other[2], output)


def life(folder: Path, kwargs: dict[str, Any]) -> None:
    module = fitted(folder, **kwargs)
    base = {f"model.{name}": value for name, value in pretrained().items()}
    with torch.no_grad():
        adapted = module.model(X)
        with disable_adapters(module):
            off = module.model(X)
        torch.testing.assert_close(module.model(X), adapted)
        merge_adapters(module)
        merged = whole_state(module)
        torch.testing.assert_close(module.model(X), adapted)
        with disable_adapters(module):
            torch.testing.assert_close(module.model(X), off)
        assert_same(whole_state(module), merged)
        unmerge_adapters(module)
        torch.testing.assert_close(module.model(X), adapted)
        merge_adapters(module)
        assert_same(whole_state(module), merged)
        unmerge_adapters(module)
        remove_adapters(module)
    assert_same(whole_state(module), base)


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["head"]}, {"init": "pissa"}], ids=str)
def test_verbs_work_on_shards(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    run_ranks(life, tmp_path, kwargs)


def for_good(folder: Path) -> dict[str, Tensor]:
    module = fitted(folder)
    merge_adapters(module, keep_base=False)
    return whole_state(module)


def test_merge_for_good_is_the_same_merge(tmp_path: Path) -> None:
    module = fitted(tmp_path, "one", merge="last")
    assert run_ranks(for_good, tmp_path)[0].keys() == whole_state(module).keys()
    assert_same(run_ranks(for_good, tmp_path)[0], run_ranks(merged_at_the_end, tmp_path)[0])


def merged_at_the_end(folder: Path) -> dict[str, Tensor]:
    return whole_state(fitted(folder, merge="last"))


def on_the_first_process(folder: Path) -> str:
    module = fitted(folder)
    return str(summarize(module)) if dist.get_rank() == 0 else ""


def test_summary_needs_one_process_alone(tmp_path: Path) -> None:
    assert "lora" in run_ranks(on_the_first_process, tmp_path)[0].lower()


def merged_file(folder: Path) -> str:
    return message_of(AdapterStateError, save_merged, fitted(folder), folder / "m.safetensors")


def test_whole_model_is_written_from_files(tmp_path: Path) -> None:
    assert "lightning-lora merge" in run_ranks(merged_file, tmp_path)[0]
    assert not (tmp_path / "m.safetensors").exists()


def saves_onto_a_folder(folder: Path) -> str:
    module = LitNet()
    t = trainer_of("sharded", folder, [lora()], max_epochs=1)
    t.fit(module, data())
    return message_of(AdapterFileError, t.save_checkpoint, folder)


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    assert "is a folder" in run_ranks(saves_onto_a_folder, tmp_path)[0]


def whole_files(folder: Path) -> str:
    return message_of(ConfigError, trainer_of("sharded", folder, [lora(save="model")]).fit, LitNet(), data())


def test_files_of_the_whole_model_are_refused_by_name(tmp_path: Path) -> None:
    for message in run_ranks(whole_files, tmp_path):
        assert "save='model' is not possible" in message and "each save would gather the whole model" in message


def averages(folder: Path, callback: L.Callback) -> str:
    return message_of(ConfigError, trainer_of("sharded", folder, [lora(), callback]).fit, LitNet(), data())


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda: bundled.EMAWeightAveraging(), marks=needs_averaging),
        lambda: bundled.StochasticWeightAveraging(swa_lrs=0.1),
    ],
)
def test_averages_are_refused_by_name(tmp_path: Path, kind: Callable[[], L.Callback]) -> None:
    for message in run_ranks(averages, tmp_path, kind()):
        assert "WeightAveraging copies the module" in message


# A language model


class Llama(LitNet):
    """A small Llama whose head is tied to its embedding."""

    def built(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            config = LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=True,
            )
            model = LlamaForCausalLM(config)
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


def test_llama_with_a_tied_head_trains_alike(tmp_path: Path) -> None:
    state = assert_alike(tmp_path, Llama)
    assert state["model.model.layers.1.mlp.down_proj.lora_B"].any()
    assert_alike(tmp_path, Llama, {"merge": "last"})


def tied(folder: Path, merge: Any) -> str:
    callback = lora(target_modules="all", merge=merge)
    module = Llama()
    message = message_of(ConfigError, trainer_of("sharded", folder, [callback], max_steps=1).fit, module, data())
    return message or message_of(AdapterStateError, merge_adapters, module)


@pytest.mark.parametrize("merge", ["last", False])
def test_tied_weights_are_not_merged_on_shards(tmp_path: Path, merge: Any) -> None:
    assert "FSDP2 keeps" in run_ranks(tied, tmp_path, merge)[0]


# What one process sees alone


def changed_on_one(folder: Path) -> tuple[str, list[str]]:
    """A merged bias of which one process holds all is changed, then adapters are asked back."""
    module = fitted(folder, merge="last", exclude_modules=["head"])
    with torch.no_grad():
        if dist.get_rank() == 0:
            module.model.layers[0].norm.bias._local_tensor.fill_(9)
    message = message_of(AdapterStateError, unmerge_adapters, module)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer_of("sharded", folder, [lora(exclude_modules=["head"])], max_epochs=1).fit(module, data())
    return message, [str(each.message) for each in found if "replaced" in str(each.message)]


def test_a_change_that_one_process_sees_counts_in_all(tmp_path: Path) -> None:
    for message, warned in run_ranks(changed_on_one, tmp_path):
        assert "were changed since its adapters were merged" in message
        assert len(warned) == 1


class Example(LitNet):
    """Its summary runs it once, before the adapters' own."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = X

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Summarizes(L.Callback):
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            summarize(pl_module)


def alone(folder: Path, kwargs: dict[str, Any]) -> None:
    callbacks = [ModelSummary(), lora(**kwargs), Summarizes()]
    trainer_of("sharded", folder, callbacks, max_epochs=1, enable_model_summary=True).fit(Example(), data(), data())


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["head"]}], ids=str)
def test_one_process_may_look_while_weights_are_gathered(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    run_ranks(alone, tmp_path, kwargs)


# What is not sharded


class Unseeded(LitNet):
    """Its head is not sharded, and every process has drawn another one."""

    def built(self) -> Any:
        net = super().built()
        torch.manual_seed(dist.get_rank())
        nn.init.normal_(net.head.weight)
        return net

    def shard(self) -> None:
        for layer in self.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])


def unseeded(folder: Path, kwargs: dict[str, Any]) -> dict[str, Tensor]:
    module = Unseeded()
    trainer_of("sharded", folder, [lora(**kwargs), Saves(folder, "sharded")]).fit(module, data(), data())
    state = whole_state(module)
    again = Unseeded()
    file = path_of(folder, "sharded", 1)
    trainer_of("sharded", folder, [lora(**kwargs)], max_epochs=3).fit(again, data(), ckpt_path=file, weights_only=True)
    return state


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["head"]}], ids=str)
def test_what_is_not_sharded_is_that_of_the_first_process(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    first, second = run_ranks(unseeded, tmp_path, kwargs)
    assert_same(second, first)


class WithNorm(LitNet):
    """A norm whose statistics are those of each process's batches."""

    def built(self) -> Any:
        net = super().built()
        net.layers[1].norm = nn.BatchNorm1d(16)
        return net


def test_running_statistics_are_those_of_ddp(tmp_path: Path) -> None:
    state = assert_alike(tmp_path, WithNorm, {"modules_to_save": ["layers.1.norm"]})
    assert state["model.layers.1.norm.running_mean"].any()


# What files hold


class Keeps(L.Callback):
    """Keeps copies of what trains, and of the base, in the checkpoint."""

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def kept(kind: str, folder: Path) -> dict[str, Any]:
    L.seed_everything(1, verbose=False)
    callbacks = [lora(modules_to_save=["head"]), Keeps(), Saves(folder, kind)]
    trainer_of(kind, folder, callbacks).fit(LitNet(), data())
    callbacks = [lora(modules_to_save=["head"]), Keeps(), reads := Reads()]
    file = path_of(folder, kind, 0)
    trainer_of(kind, folder, callbacks).fit(LitNet(), data(), ckpt_path=file, weights_only=True)
    return reads.kept


class Reads(L.Callback):
    kept: dict[str, Any]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.kept = checkpoint["kept"]


def test_copies_in_a_checkpoint_are_made_full(tmp_path: Path) -> None:
    expected, found = run_ranks(kept, "ddp", tmp_path)[0], run_ranks(kept, "sharded", tmp_path)[1]
    assert_same(found, expected)
    sizes = [path_of(tmp_path, kind, 1).stat().st_size for kind in ("ddp", "sharded")]
    assert abs(sizes[0] - sizes[1]) < 200


# What torch cannot run


class Optimized(LitNet):
    def __init__(self, kind: type[torch.optim.Optimizer], **kwargs: Any) -> None:
        super().__init__()
        self.kind, self.kwargs = kind, kwargs

    def configure_optimizers(self) -> Any:
        return self.kind(self.parameters(), lr=0.1, **self.kwargs)


class HeadLeftOut(Optimized):
    shard = Unseeded.shard


def refusal(folder: Path, module: LitNet, kwargs: dict[str, Any], clips: float | None) -> str:
    t = trainer_of("sharded", folder, [lora(**kwargs)], max_steps=1, gradient_clip_val=clips)
    return message_of(LoRAError, t.fit, module, data())


@pytest.mark.parametrize(
    ("module", "clips", "message"),
    [
        (Optimized(torch.optim.LBFGS), None, "LBFGS of Optimized joins all parameters"),
        (HeadLeftOut(torch.optim.AdamW), 0.1, "'model.head.bias' are. Torch takes no mixture"),
        (HeadLeftOut(torch.optim.AdamW, foreach=True), None, "'model.head.bias' are. Torch takes no mixture"),
        (HeadLeftOut(torch.optim.AdamW), None, ""),
    ],
    ids=["lbfgs", "clips", "foreach", "alone"],
)
def test_optimizers_that_torch_cannot_run_on_shards_are_refused(
    tmp_path: Path, module: LitNet, clips: float | None, message: str
) -> None:
    for found in run_ranks(refusal, tmp_path, module, {"bias": "all"}, clips):
        assert message in found and bool(message) == bool(found)


class WithoutMesh(LitNet):
    def shard(self) -> None:
        for layer in self.model.layers:
            fully_shard(layer)


def default_strategy(folder: Path) -> str:
    t = trainer_of("one", folder, [lora()], devices=2, strategy=ModelParallelStrategy())
    return message_of(StrategyError, t.fit, WithoutMesh(), data())


def test_shards_over_other_processes_than_the_batches_are_refused(tmp_path: Path) -> None:
    for message in run_ranks(default_strategy, tmp_path):
        assert 'sharded over 2 processes, but the mesh "data_parallel" has 1' in message


def without_arguments(folder: Path) -> str:
    t = trainer_of("sharded", folder, [LoRACallback(target_modules="all-liner")], max_steps=1)
    return message_of(TargetError, t.fit, LitNet(), data(), None, None, folder / "a.ckpt")


def test_arguments_that_come_too_late_are_asked_for(tmp_path: Path) -> None:
    for message in run_ranks(without_arguments, tmp_path):
        assert "before a checkpoint is read" in message


# After an error


class Changes(L.Callback):
    """Changes a frozen weight, and fails."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        with torch.no_grad():
            pl_module.model.layers[0].norm.weight.mul_(2)
        raise StopError


def fails_and_goes_on(kind: str, folder: Path) -> dict[str, Tensor]:
    L.seed_everything(1, verbose=False)
    module = LitNet()
    message_of(StopError, trainer_of(kind, folder, [lora(), Changes()]).fit, module, data())
    trainer_of(kind, folder, [lora(), Saves(folder, kind)], max_epochs=1).fit(module, data())
    return held(torch.load(path_of(folder, kind, 0), weights_only=True))


def test_what_a_failed_run_changed_is_in_the_next_file(tmp_path: Path) -> None:
    ddp, sharded = (run_ranks(fails_and_goes_on, kind, tmp_path)[0] for kind in ("ddp", "sharded"))
    assert "model.layers.0.norm.weight" in sharded
    assert_same(sharded, ddp)


class Whole(LitNet):
    def shard(self) -> None:
        pass


class OnOneProcess(LitNet):
    """Shards over the mesh of a default strategy, which has one process."""

    def shard(self) -> None:
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


def told(folder: Path, module: LitNet, strategy: ModelParallelStrategy) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer_of("one", folder, [lora()], devices=2, strategy=strategy, max_steps=1).fit(module, data())
    return [str(each.message) for each in found if each.category is LoRAWarning]


@pytest.mark.parametrize(
    ("module", "strategy", "count"),
    [(Whole(), lambda: ModelParallelStrategy(2, 1), 2), (OnOneProcess(), ModelParallelStrategy, 1)],
    ids=["not sharded", "default strategy"],
)
def test_a_model_that_is_not_sharded_is_named(
    tmp_path: Path, module: LitNet, strategy: Callable[[], ModelParallelStrategy], count: int
) -> None:
    def run() -> list[str]:
        return told(tmp_path, module, strategy())

    first, second = run_ranks(run)
    assert len(first) == 1 and not second
    assert first[0].startswith(f"Nothing of {type(module).__name__} is sharded") and f"{count} of 2 read" in first[0]


class Odd(Unseeded):
    """What is not sharded has other layouts and dtypes than broadcasts take as they are."""

    def built(self) -> Any:
        net = super().built()
        net.head.weight = nn.Parameter(torch.randn(16, 3).t())
        net.register_buffer("mask", torch.tensor([dist.get_rank() == 0, True]))
        net.register_buffer("turn", torch.full((2,), 1j * dist.get_rank()))
        net.register_buffer("count", torch.tensor(dist.get_rank()))
        return net


def odd(folder: Path) -> dict[str, Tensor]:
    module = Odd()
    trainer_of("sharded", folder, [lora()], max_steps=1).fit(module, data())
    return whole_state(module)


def test_every_layout_and_dtype_is_shared(tmp_path: Path) -> None:
    first, second = run_ranks(odd, tmp_path)
    assert_same(second, first)
    assert first["model.mask"].all() and not first["model.turn"].any() and not first["model.count"]

"""Calls on a model while it is sharded, and what is refused there."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
)
from transformers import LlamaForCausalLM

import lightning_lora as ll
from tests.support.compared import assert_holds
from tests.support.messages import lines_with, messages_of, warned_by
from tests.support.ranks import run_ranks
from tests.support.sharded import (
    LitNet,
    data,
    fully_shard,
    lora,
    pretrained_in_module,
    trainer_of,
    whole_state,
)
from tests.support.sharded_fits import (
    Saves,
    State,
    assert_same,
    built,
    message_of,
    path_of,
)
from tests.support.versions import needs_averaging
from tests.training.test_sharded import Blocks, Llama

pytestmark = pytest.mark.processes

X = torch.arange(64.0).reshape(4, 16).sin()


def fitted(folder: Path, **kwargs: Any) -> LitNet:
    """A sharded module after a fit, in eval mode."""
    L.seed_everything(1, verbose=False)
    module = LitNet()
    t = trainer_of("sharded", folder, [lora(**kwargs)], max_epochs=1)
    t.fit(module, data())
    return module.eval()


@torch.no_grad()
def output_of(module: Any) -> Tensor:
    output: Tensor = module.model(X)
    return output


# Files


@dataclass
class Files:
    """What a process has after it has written its files: its module's state, the adapters alone, and its output."""

    trained: State
    adapters: State
    output: Tensor


def files(folder: Path) -> Files:
    """Fit, write files, and load one of them into a sharded module."""
    file = folder / "a.safetensors"
    kwargs: dict[str, Any] = {
        "modules_to_save": ["head"],
        "use_dora": True,
        "dropout": 0.0,
    }
    module = fitted(folder, **kwargs)
    ll.save_adapter(module, file)
    assert load_file(file).keys() == ll.adapter_state_dict(module).keys()
    ll.export_peft(module, folder / f"peft-{dist.get_rank()}")
    trained = whole_state(module)
    again = LitNet()
    trainer_of("sharded", folder, [lora(**kwargs)], max_steps=0).fit(again, data())
    ll.load_adapter(again, file)
    assert_same(whole_state(again), trained)
    return Files(trained, ll.adapter_state_dict(again), output_of(module))


def test_files_of_a_sharded_model_are_read_on_one_device(tmp_path: Path) -> None:
    found, other = run_ranks(files, tmp_path)
    for value in found.adapters.values():
        assert type(value) in (Tensor, nn.Parameter)
    for source in ("a.safetensors", "peft-0", "peft-1"):
        module = built(tmp_path / source)
        whole = whole_state(module)
        assert_same(whole, found.trained)
        assert_holds(whole, found.adapters)
        module.eval()
        torch.testing.assert_close(output_of(module), found.output)
    torch.testing.assert_close(other.output, found.output)


# Calls


def assert_nothing_is_added(module: LitNet, folder: Path) -> None:
    """On shards, no merged file is written, and no second adapter comes to the first."""
    before = whole_state(module)
    merged = folder / "m.safetensors"
    assert "lightning-lora merge" in message_of(ll.save_merged, module, merged)
    assert not merged.exists()
    refusal = "are sharded over processes, where only set_adapter(model, None)"
    config = ll.LoRAConfig(r=1)
    assert refusal in message_of(ll.inject_adapters, module, config, name="new")
    file = folder / "a.safetensors"
    ll.save_adapter(module, file)
    assert refusal in message_of(ll.load_adapter, module, file, name="new")
    assert_same(whole_state(module), before)
    assert ll.adapters(module) == ("default",)


def assert_merges_and_unmerges(module: LitNet) -> State:
    """The merged model computes the same, with the same bits each time.

    Return its state; it ends un-merged.
    """
    adapted = output_of(module)
    with ll.disable_adapters(module):
        of_base = output_of(module)
    torch.testing.assert_close(output_of(module), adapted)
    ll.merge_adapters(module)
    merged = whole_state(module)
    torch.testing.assert_close(output_of(module), adapted)
    with ll.disable_adapters(module):
        torch.testing.assert_close(output_of(module), of_base)
    assert_same(whole_state(module), merged)
    ll.unmerge_adapters(module)
    torch.testing.assert_close(output_of(module), adapted)
    ll.merge_adapters(module)
    assert_same(whole_state(module), merged)
    ll.unmerge_adapters(module)
    return merged


def life_until_a_merge_for_good(folder: Path) -> None:
    module = fitted(folder)
    assert_nothing_is_added(module, folder)
    merged = assert_merges_and_unmerges(module)
    if dist.get_rank() == 0:
        # this process alone, with gathered weights
        assert "lora" in str(ll.summarize(module)).lower()
    ll.merge_adapters(module, keep_base=False)
    assert_same(whole_state(module), merged)


def life_until_the_adapters_are_removed(folder: Path) -> None:
    module = fitted(folder, modules_to_save=["head"], init="pissa")
    assert_nothing_is_added(module, folder)
    assert_merges_and_unmerges(module)
    if dist.get_rank() == 0:
        assert "lora" in str(ll.summarize(module)).lower()
    ll.remove_adapters(module)
    assert_same(whole_state(module), pretrained_in_module())


@pytest.mark.parametrize(
    "life", [life_until_a_merge_for_good, life_until_the_adapters_are_removed]
)
def test_verbs_work_on_shards(tmp_path: Path, life: Any) -> None:
    run_ranks(life, tmp_path)


def ids_of_parameters(module: nn.Module) -> list[int]:
    return [id(p) for p in module.parameters()]


class Asks(L.Callback):
    """Calls save_pretrained in the first process: without a state, and with one that all gathered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: set[str] = set()

    def on_train_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        if trainer.is_global_zero:
            message = message_of(model.save_pretrained, self.folder / "refused")
            self.said.add(message)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        whole = get_model_state_dict(model, options=options)
        before = ids_of_parameters(model)
        if trainer.is_global_zero:
            to = self.folder / str(trainer.current_epoch)
            with pytest.warns(ll.LoRAWarning, match="writes merged weights"):
                model.save_pretrained(to, state_dict=whole)
        assert ids_of_parameters(model) == before


IDS = torch.arange(8)[None]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(IDS).logits
    return found


def saved(folder: Path) -> tuple[set[str], Tensor]:
    """What is said of a state that was not gathered, and the model's output."""
    asks = Asks(folder)
    module = Llama()
    callback = lora(modules_to_save=["norm"], use_dora=True, dropout=0.0)
    t = trainer_of("sharded", folder, [callback, asks], max_epochs=2)
    t.fit(module, data(), data())
    module.eval()
    output = logits(module.model)
    with torch.no_grad():
        asks.save(t, module)  # the outermost module shows whole weights now
    torch.testing.assert_close(logits(module.model), output)
    return asks.said, output


@pytest.mark.filterwarnings("ignore::lightning_lora.FreshLayerWarning")
def test_save_pretrained_merges_a_gathered_state_and_gathers_none(
    tmp_path: Path,
) -> None:
    (messages, output), (_, other) = run_ranks(saved, tmp_path)
    (said,) = messages
    assert "LlamaForCausalLM is spread over processes" in said
    assert "state_dict=" in said
    assert not (tmp_path / "refused").exists()
    for epoch in ("1", "2"):
        again = LlamaForCausalLM.from_pretrained(tmp_path / epoch)
        again.eval()
        torch.testing.assert_close(logits(again), output)
    torch.testing.assert_close(other, output)


# What is refused


class WithoutMesh(LitNet):
    def shard(self) -> None:
        for layer in self.model.layers:
            fully_shard(layer)


def whole_model() -> list[L.Callback]:
    return [lora(save="model")]


def with_ema() -> list[L.Callback]:
    return [lora(), bundled.EMAWeightAveraging()]


def with_swa() -> list[L.Callback]:
    return [lora(), bundled.StochasticWeightAveraging(swa_lrs=0.1)]


def that_merge_a_tied_weight() -> list[L.Callback]:
    return [lora(target_modules="all", merge="last")]


def refusal(
    folder: Path, build: Callable[[], LitNet], make: Callable[[], list[L.Callback]]
) -> str:
    t = trainer_of("sharded", folder, make(), max_steps=1)
    return message_of(t.fit, build(), data())


COPIES = "ConfigError: .*WeightAveraging copies the module"


@pytest.mark.parametrize(
    ("build", "make", "message"),
    [
        (
            LitNet,
            whole_model,
            "ConfigError: save='model' is not .* gather the whole model",
        ),
        pytest.param(LitNet, with_ema, COPIES, marks=needs_averaging),
        (LitNet, with_swa, COPIES),
        (Llama, that_merge_a_tied_weight, "ConfigError: .*FSDP2 keeps"),
    ],
)
def test_what_cannot_run_on_shards_is_refused_in_every_process(
    tmp_path: Path, build: Any, make: Any, message: str
) -> None:
    for found in run_ranks(refusal, tmp_path, build, make):
        assert re.search(f"(?s)^{message}", found)


def refusal_without_mesh(folder: Path) -> str:
    t = trainer_of(
        "sharded", folder, [lora()], max_steps=1, strategy=ModelParallelStrategy()
    )
    return message_of(t.fit, WithoutMesh(), data())


def test_shards_over_other_processes_than_the_mesh_has_are_refused_in_every_process(
    tmp_path: Path,
) -> None:
    says = (
        'StrategyError: .*sharded over 2 processes, but the mesh "data_parallel" has 1'
    )
    for found in run_ranks(refusal_without_mesh, tmp_path):
        assert re.search(f"(?s)^{says}", found)


def unsaved(folder: Path) -> tuple[str, str]:
    """What is said where the file cannot be written, and where one process's values have diverged."""
    module = fitted(folder, modules_to_save=["head"])
    unwritten = message_of(ll.save_adapter, module, folder / "folder.safetensors")
    if dist.get_rank() == 1:
        module.model.head.weight._local_tensor.data.fill_(torch.nan)
    diverged = message_of(ll.save_adapter, module, folder / "a.safetensors")
    return unwritten, diverged


def test_an_error_of_one_process_is_raised_in_all(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for unwritten, diverged in run_ranks(unsaved, tmp_path):
        assert "could not be written" in unwritten
        assert "hold NaN" in diverged


def folder_in_the_way(folder: Path) -> str:
    module = LitNet()
    t = trainer_of("sharded", folder, [lora()], max_epochs=1)
    t.fit(module, data())
    return message_of(t.save_checkpoint, folder / "a.ckpt")


def test_a_sharded_checkpoint_in_the_place_of_a_file_is_named_in_every_process(
    tmp_path: Path,
) -> None:
    (tmp_path / "a.ckpt").mkdir()
    for message in run_ranks(folder_in_the_way, tmp_path):
        assert re.search(
            r"a\.ckpt is a folder, perhaps a sharded checkpoint.*another name", message
        )
    assert not list((tmp_path / "a.ckpt").iterdir())


def changed_on_one(folder: Path) -> tuple[str, list[str]]:
    """A merged bias of which one process holds all is changed, then adapters are asked back."""
    module = fitted(folder, merge="last", exclude_modules=["head"])
    if dist.get_rank() == 0:
        bias = module.model.layers[0].norm.bias
        with torch.no_grad():
            bias._local_tensor.fill_(9)
    message = message_of(ll.unmerge_adapters, module)
    t = trainer_of("sharded", folder, [lora(exclude_modules=["head"])], max_epochs=1)
    caught = warned_by(t.fit, module, data())
    return message, lines_with("replaced", messages_of(caught))


def test_a_change_that_one_process_sees_counts_in_all(tmp_path: Path) -> None:
    for message, warned in run_ranks(changed_on_one, tmp_path):
        assert "were changed since its adapters were merged" in message
        assert len(warned) == 1


class Unseeded(Blocks):
    """What is not sharded was drawn anew in each process, with layouts that broadcasts refuse."""

    def built(self) -> Any:
        net = super().built()
        rank = dist.get_rank()
        torch.manual_seed(rank)
        net.head.weight = nn.Parameter(torch.randn(16, 3).t())
        net.register_buffer("mask", torch.tensor([rank == 0, True]))
        net.register_buffer("turn", torch.full((2,), 1j * rank))
        net.register_buffer("count", torch.tensor(rank))
        return net


def unseeded(folder: Path) -> State:
    """The state after a fit, from whose file a second one goes on."""
    module = Unseeded()
    t = trainer_of("sharded", folder, [lora(), Saves(folder, "sharded")])
    t.fit(module, data(), data())
    state = whole_state(module)
    file = path_of(folder, "sharded", 1)
    resumed = trainer_of("sharded", folder, [lora()], max_epochs=3)
    resumed.fit(Unseeded(), data(), ckpt_path=file, weights_only=True)
    return state


def test_what_is_not_sharded_is_that_of_the_first_process(tmp_path: Path) -> None:
    first, second = run_ranks(unseeded, tmp_path)
    assert_same(second, first)
    assert first["model.mask"].all()
    assert not first["model.turn"].any()
    assert first["model.count"] == 0

"""Calls on a model while it is sharded, and what is refused there."""

import re
import warnings
from collections.abc import Callable
from functools import partial
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlamaForCausalLM

import lightning_lora as ll
from tests.support.ranks import run_ranks
from tests.support.sharded import LitNet, data, fully_shard, lora, pretrained, trainer_of, whole_state
from tests.support.sharded_fits import Saves, State, assert_same, built, message_of, path_of
from tests.support.versions import needs_averaging
from tests.training.test_sharded import Blocks, Llama

pytestmark = pytest.mark.processes

X = torch.arange(64.0).reshape(4, 16).sin()


def fitted(folder: Path, **kwargs: Any) -> LitNet:
    L.seed_everything(1, verbose=False)
    module = LitNet()
    trainer_of("sharded", folder, [lora(**kwargs)], max_epochs=1).fit(module, data())
    return module.eval()


def files(folder: Path) -> tuple[State, State, Tensor]:
    kwargs: dict[str, Any] = {"modules_to_save": ["head"], "use_dora": True, "dropout": 0.0}
    module = fitted(folder, **kwargs)
    ll.save_adapter(module, folder / "a.safetensors")
    assert load_file(folder / "a.safetensors").keys() == ll.adapter_state_dict(module).keys()
    ll.export_peft(module, folder / f"peft-{dist.get_rank()}")
    trained = whole_state(module)
    again = LitNet()
    trainer_of("sharded", folder, [lora(**kwargs)], max_steps=0).fit(again, data())
    ll.load_adapter(again, folder / "a.safetensors")
    assert_same(whole_state(again), trained)
    with torch.no_grad():
        return trained, ll.adapter_state_dict(again), module.model(X)


def test_files_of_a_sharded_model_are_read_on_one_device(tmp_path: Path) -> None:
    (trained, state, output), other = run_ranks(files, tmp_path)
    assert not [name for name, value in state.items() if type(value) is not Tensor and type(value) is not nn.Parameter]
    for source in ("a.safetensors", "peft-0", "peft-1"):
        module = built(tmp_path / source)
        assert_same({name: value for name, value in whole_state(module).items() if name in state}, state)
        assert_same(whole_state(module), trained)
        torch.testing.assert_close(module.eval().model(X), output)
    torch.testing.assert_close(other[2], output)


def life(folder: Path, kwargs: dict[str, Any]) -> None:
    module = fitted(folder, **kwargs)
    base = {f"model.{name}": value for name, value in pretrained().items()}
    assert "lightning-lora merge" in message_of(ll.save_merged, module, folder / "m.safetensors")
    assert not (folder / "m.safetensors").exists()
    fitted_state = whole_state(module)
    ll.save_adapter(module, folder / "a.safetensors")
    new = partial(ll.inject_adapters, module, ll.LoRAConfig(r=1), name="new")
    for call in (new, partial(ll.load_adapter, module, folder / "a.safetensors", name="new")):
        assert "are sharded over processes, where only set_adapter(model, None)" in message_of(call)
    assert_same(whole_state(module), fitted_state)
    assert ll.adapters(module) == ("default",)
    with torch.no_grad():
        adapted = module.model(X)
        if dist.get_rank() == 0:
            assert "lora" in str(ll.summarize(module)).lower()  # this process alone, with gathered weights
        with ll.disable_adapters(module):
            off = module.model(X)
        torch.testing.assert_close(module.model(X), adapted)
        ll.merge_adapters(module)
        merged = whole_state(module)
        torch.testing.assert_close(module.model(X), adapted)
        with ll.disable_adapters(module):
            torch.testing.assert_close(module.model(X), off)
        assert_same(whole_state(module), merged)
        ll.unmerge_adapters(module)
        torch.testing.assert_close(module.model(X), adapted)
        ll.merge_adapters(module)
        assert_same(whole_state(module), merged)
        ll.unmerge_adapters(module)
    if kwargs:
        ll.remove_adapters(module)
        assert_same(whole_state(module), base)
    else:
        ll.merge_adapters(module, keep_base=False)
        assert_same(whole_state(module), merged)


@pytest.mark.parametrize("kwargs", [{}, {"modules_to_save": ["head"], "init": "pissa"}], ids=str)
def test_verbs_work_on_shards(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    run_ranks(life, tmp_path, kwargs)


class Asks(L.Callback):  # calls save_pretrained in the first process: without a state, and with one that all gathered
    def __init__(self, folder: Path) -> None:
        self.folder, self.said = folder, set[str]()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        if trainer.is_global_zero:
            self.said.add(message_of(model.save_pretrained, self.folder / "refused"))
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        before = list(map(id, model.parameters()))
        if trainer.is_global_zero:
            with pytest.warns(ll.LoRAWarning, match="writes merged weights"):
                model.save_pretrained(self.folder / str(trainer.current_epoch), state_dict=whole)
        assert list(map(id, model.parameters())) == before


def saved(folder: Path) -> tuple[set[str], Tensor]:
    asks, module = Asks(folder), Llama()
    callback = lora(modules_to_save=["norm"], use_dora=True, dropout=0.0)
    t = trainer_of("sharded", folder, [callback, asks], max_epochs=2)
    t.fit(module, data(), data())
    with torch.no_grad():
        output = module.eval().model(IDS).logits
        asks.save(t, module)  # the outermost module shows whole weights now
        torch.testing.assert_close(module.model(IDS).logits, output)
    return asks.said, output


IDS = torch.arange(8)[None]


@pytest.mark.filterwarnings("ignore::lightning_lora.FreshLayerWarning")
def test_save_pretrained_merges_a_gathered_state_and_gathers_none(tmp_path: Path) -> None:
    ((said,), output), (_, other) = run_ranks(saved, tmp_path)
    assert "LlamaForCausalLM is spread over processes" in said and "state_dict=" in said
    assert not (tmp_path / "refused").exists()
    for epoch in ("1", "2"):
        again = LlamaForCausalLM.from_pretrained(tmp_path / epoch).eval()
        torch.testing.assert_close(again(IDS).logits, output)
    torch.testing.assert_close(other, output)


# What is refused


class WithoutMesh(LitNet):
    def shard(self) -> None:
        for layer in self.model.layers:
            fully_shard(layer)


def refusal(folder: Path, module: LitNet, make: Callable[[], list[L.Callback]], options: dict[str, Any]) -> str:
    path, strategy = options.pop("ckpt_path", None), options.pop("strategy", None)
    if strategy is not None:
        options["strategy"] = strategy()
    t = trainer_of("sharded", folder, make(), max_steps=1, **options)
    return message_of(t.fit, module, data(), ckpt_path=path)


COPIES = "ConfigError: .*WeightAveraging copies the module"
OTHER_PROCESSES = 'StrategyError: .*sharded over 2 processes, but the mesh "data_parallel" has 1'


@pytest.mark.parametrize(
    ("module", "make", "options", "message"),
    [
        (LitNet(), lambda: [lora(save="model")], {}, "ConfigError: save='model' is not .* gather the whole model"),
        pytest.param(LitNet(), lambda: [lora(), bundled.EMAWeightAveraging()], {}, COPIES, marks=needs_averaging),
        (LitNet(), lambda: [lora(), bundled.StochasticWeightAveraging(swa_lrs=0.1)], {}, COPIES),
        (Llama(), lambda: [lora(target_modules="all", merge="last")], {}, "ConfigError: .*FSDP2 keeps"),
        (WithoutMesh(), lambda: [lora()], {"strategy": ModelParallelStrategy}, OTHER_PROCESSES),
    ],
)
def test_what_cannot_run_on_shards_is_refused_in_every_process(
    tmp_path: Path, module: LitNet, make: Callable[[], list[L.Callback]], options: dict[str, Any], message: str
) -> None:
    for found in run_ranks(refusal, tmp_path, module, make, options):
        assert re.search(f"(?s)^{message}", found)


def unsaved(folder: Path) -> tuple[str, str]:
    module = fitted(folder, modules_to_save=["head"])
    unwritten = message_of(ll.save_adapter, module, folder / "folder.safetensors")
    if dist.get_rank() == 1:
        module.model.head.weight._local_tensor.data.fill_(torch.nan)
    return unwritten, message_of(ll.save_adapter, module, folder / "a.safetensors")


def test_an_error_of_one_process_is_raised_in_all(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    for unwritten, diverged in run_ranks(unsaved, tmp_path):
        assert "could not be written" in unwritten and "hold NaN" in diverged


def folder_in_the_way(folder: Path) -> str:
    module = LitNet()
    t = trainer_of("sharded", folder, [lora()], max_epochs=1)
    t.fit(module, data())
    return message_of(t.save_checkpoint, folder / "a.ckpt")


def test_a_sharded_checkpoint_in_the_place_of_a_file_is_named_in_every_process(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").mkdir()
    for message in run_ranks(folder_in_the_way, tmp_path):
        assert re.search(r"a\.ckpt is a folder, perhaps a sharded checkpoint.*another name", message)
    assert not list((tmp_path / "a.ckpt").iterdir())


def changed_on_one(folder: Path) -> tuple[str, list[str]]:
    """A merged bias of which one process holds all is changed, then adapters are asked back."""
    module = fitted(folder, merge="last", exclude_modules=["head"])
    with torch.no_grad():
        if dist.get_rank() == 0:
            module.model.layers[0].norm.bias._local_tensor.fill_(9)
    message = message_of(ll.unmerge_adapters, module)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer_of("sharded", folder, [lora(exclude_modules=["head"])], max_epochs=1).fit(module, data())
    return message, [str(each.message) for each in found if "replaced" in str(each.message)]


def test_a_change_that_one_process_sees_counts_in_all(tmp_path: Path) -> None:
    for message, warned in run_ranks(changed_on_one, tmp_path):
        assert "were changed since its adapters were merged" in message
        assert len(warned) == 1


class Unseeded(Blocks):  # what is not sharded was drawn anew in each process, with layouts that broadcasts refuse
    def built(self) -> Any:
        net = super().built()
        torch.manual_seed(dist.get_rank())
        net.head.weight = nn.Parameter(torch.randn(16, 3).t())
        net.register_buffer("mask", torch.tensor([dist.get_rank() == 0, True]))
        net.register_buffer("turn", torch.full((2,), 1j * dist.get_rank()))
        net.register_buffer("count", torch.tensor(dist.get_rank()))
        return net


def unseeded(folder: Path) -> State:
    module = Unseeded()
    trainer_of("sharded", folder, [lora(), Saves(folder, "sharded")]).fit(module, data(), data())
    state = whole_state(module)
    t = trainer_of("sharded", folder, [lora()], max_epochs=3)
    t.fit(Unseeded(), data(), ckpt_path=path_of(folder, "sharded", 1), weights_only=True)
    return state


def test_what_is_not_sharded_is_that_of_the_first_process(tmp_path: Path) -> None:
    first, second = run_ranks(unseeded, tmp_path)
    assert_same(second, first)
    assert first["model.mask"].all() and not first["model.turn"].any() and not first["model.count"]

"""Calls on a model while it is sharded, and what is refused there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora import (
    AdapterFileError,
    AdapterStateError,
    ConfigError,
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
from tests.ranks import run_ranks
from tests.training.sharded_cases import LitNet, data, fully_shard, lora, pretrained, trainer_of, whole_state
from tests.training.test_sharded import assert_alike, assert_same

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


def averages(folder: Path, callback: L.Callback) -> str:
    return message_of(ConfigError, trainer_of("sharded", folder, [lora(), callback]).fit, LitNet(), data())


@pytest.mark.parametrize("kind", [EMAWeightAveraging, lambda: StochasticWeightAveraging(swa_lrs=0.1)])
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

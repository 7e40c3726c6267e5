"""A file of adapters merged into a file of the base."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    LoRAConfig,
    LoRAWarning,
    MergePrecisionWarning,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from lightning_lora.model.view import View
from lightning_lora.storage.offline.merge import merge_files
from tests.support.models import LitTiny, TinyLM, best, data, lora, randomise, same, state, trainer


class Mixed(nn.Module):
    """Layers of several kinds, with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.linear, self.narrow = nn.Linear(8, 8), nn.Linear(8, 8).bfloat16()
        self.conv = nn.Conv1d(4, 8, 3, groups=2)
        self.norm = nn.BatchNorm1d(8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.lstm = nn.LSTM(8, 4)
        self.head = nn.Linear(8, 3)


CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all"},
    "dora": {"target_modules": ["linear", "narrow", "embed"], "use_dora": True},
    "pissa": {"target_modules": ["linear", "conv"], "init": "pissa"},
    "slices": {
        "target_modules": ["linear", "attention"],
        "target_slices": {"linear": {"a": (0, 4)}, "attention": ["q"]},
    },
    "parameters": {"target_modules": ["head"], "target_parameters": ["attention.in_proj_weight"]},
    "biases": {"target_modules": ["linear"], "bias": "all", "use_rslora": True, "alpha": 3},
}


def saved(folder: Path, config: dict[str, Any], model: nn.Module) -> tuple[Path, Path, dict[str, Tensor]]:
    """Files of the base and of the adapters, and the merged state."""
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "base.safetensors")
    inject_adapters(model, LoRAConfig(**{"r": 2, "modules_to_save": ["norm"], **config}))
    randomise(model)
    for p in View(model).trained.values():
        nn.init.uniform_(p)
    save_adapter(model, folder / "adapter.safetensors")
    merge_adapters(model)
    return folder / "base.safetensors", folder / "adapter.safetensors", state(model)


@pytest.mark.filterwarnings("ignore::lightning_lora.MergePrecisionWarning")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_merged_file_has_the_bits_of_the_merged_model(tmp_path: Path, config: dict[str, Any]) -> None:
    if "target_parameters" in config:
        config = {**config, "target_parameters": None, "target_modules": ["head", "lstm"]}
    base, adapter, expected = saved(tmp_path, config, Mixed())
    merge_files(base, adapter, tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert [value.dtype for value in found.values()] == [expected[name].dtype for name in found]


def test_experts_are_merged(tmp_path: Path) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.up

    model = nn.ModuleDict({"experts": Experts(), "norm": nn.LayerNorm(4)})
    base, adapter, expected = saved(tmp_path, {"target_modules": [], "target_parameters": ["experts.up"]}, model)
    merge_files(base, adapter, tmp_path / "merged.safetensors")
    assert torch.equal(load_file(tmp_path / "merged.safetensors")["experts.up"], expected["experts.up"])


class Around(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        config = BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=9
        )
        self.model = BertModel(config)


def test_a_folder_is_merged_as_it_is_divided(tmp_path: Path) -> None:
    model = Around()
    model.model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["pooler"]))
    randomise(model)
    save_adapter(model, tmp_path / "adapter.safetensors")
    merge_adapters(model)
    merge_files(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged")
    assert {file.name for file in (tmp_path / "base").iterdir()} == {
        file.name for file in (tmp_path / "merged").iterdir()
    }
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "merged" / index).read_text()) == json.loads((tmp_path / "base" / index).read_text())
    loaded = BertModel.from_pretrained(tmp_path / "merged")
    assert same(state(loaded), state(model.model))


def test_a_checkpoint_is_merged_into_one_that_lightning_reads(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2).fit(pretrained := LitTiny(), data())
    t = trainer(tmp_path, max_steps=2)
    t.strategy.connect(pretrained)
    t.save_checkpoint(tmp_path / "base.ckpt")
    keep = best(tmp_path / "adapters")
    t = trainer(tmp_path, [lora(), keep])
    t.fit(pretrained, data(), data())
    merge_files(tmp_path / "base.ckpt", Path(keep.best_model_path), tmp_path / "merged.ckpt")
    expected = LitTiny()
    unmerge_adapters(pretrained)
    load_adapter(pretrained, keep.best_model_path)
    merge_adapters(pretrained)
    found = LitTiny.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert same(state(found), state(pretrained)) and not same(state(found), state(expected))
    assert torch.load(tmp_path / "merged.ckpt", weights_only=True).keys().isdisjoint({"lightning_lora", "callbacks"})


def test_a_new_head_is_added(tmp_path: Path) -> None:
    model = Mixed()
    base, adapter, expected = saved(tmp_path, {"target_modules": ["linear"], "modules_to_save": ["head"]}, model)
    without = {name: value for name, value in load_file(base).items() if not name.startswith("head")}
    save_file(without, base)
    merge_files(base, adapter, tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_frozen_weight_that_changed_in_training_is_merged_as_it_was_then(tmp_path: Path) -> None:
    class Changing(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            pl_module.q_proj.weight.data[0, 0] += 1

    model, keep = LitTiny(), best(tmp_path, monitor=None)
    save_file(LitTiny().state_dict(), tmp_path / "base.safetensors")
    trainer(tmp_path, [lora(), keep, Changing()]).fit(model, data())
    merge_files(tmp_path / "base.safetensors", Path(keep.best_model_path), tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def untouched(folder: Path) -> bool:
    return not [file for file in folder.iterdir() if "merged" in file.name]


def other_value(state: dict[str, Tensor]) -> None:
    state["linear.weight"][0, 0] += 1


def other_frozen_value(state: dict[str, Tensor]) -> None:
    state["embed.weight"][0, 0] += 1


def no_weight(state: dict[str, Tensor]) -> None:
    del state["linear.weight"]


def other_shape(state: dict[str, Tensor]) -> None:
    state["linear.weight"] = state["linear.weight"][:4].clone()


@pytest.mark.filterwarnings("ignore::lightning_lora.MergePrecisionWarning")
@pytest.mark.parametrize("narrower", [True, False])
def test_the_same_base_in_another_precision_is_merged_with_a_warning(tmp_path: Path, narrower: bool) -> None:
    there, here = (torch.float32, torch.bfloat16) if narrower else (torch.bfloat16, torch.float32)
    model = TinyLM(tied=False).to(there)
    base = {name: value.to(here) for name, value in model.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model)
    save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.warns(LoRAWarning, match="the same base, converted"):
        merge_files(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors")
    found = load_file(tmp_path / "merged.safetensors")
    assert found["q_proj.weight"].dtype is here and not torch.equal(found["q_proj.weight"], base["q_proj.weight"])
    delta = (model.q_proj.lora_B @ model.q_proj.lora_A).float()  # type: ignore[operator]
    torch.testing.assert_close(found["q_proj.weight"], (base["q_proj.weight"].float() + delta).to(here))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (other_value, BaseMismatchError, "'linear.weight'"),
        (other_frozen_value, BaseMismatchError, "'embed.weight'"),
        (no_weight, AdapterMismatchError, r"linear.weight \[8, 8\]"),
        (other_shape, AdapterMismatchError, r"linear.weight \[8, 8\]"),
    ],
)
def test_another_base_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], error: type[Exception], says: str
) -> None:
    base, adapter, _ = saved(tmp_path, {"target_modules": ["linear"]}, Mixed())
    changed = load_file(base)
    change(changed)
    save_file(changed, base)
    with pytest.raises(error, match=says):
        merge_files(base, adapter, tmp_path / "merged.safetensors")
    assert untouched(tmp_path)


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    model = TinyLM()
    values = copy.deepcopy(model.state_dict())
    save_file({name: value.clone() for name, value in values.items()}, tmp_path / "base.safetensors")
    inject_adapters(model, LoRAConfig(r=2, target_modules=["embed"]))
    save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"'embed.weight' are tied.*merge_adapters"):
        merge_files(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors")
    assert untouched(tmp_path)


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    base, adapter, _ = saved(tmp_path, {"target_modules": ["linear"]}, Mixed())
    for wrong in ("nothing.safetensors", "nothing"):
        with pytest.raises(FileNotFoundError, match="nothing"):
            merge_files(tmp_path / wrong, adapter, tmp_path / "merged.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterFileError, match="neither"):
        merge_files(tmp_path / "empty", adapter, tmp_path / "merged")
    with pytest.raises(AdapterFileError, match="cannot be written from"):
        merge_files(base, adapter, tmp_path / "merged.ckpt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(AdapterFileError, match="no weights"):
        merge_files(tmp_path / "list.pt", adapter, tmp_path / "merged.ckpt")
    assert untouched(tmp_path)


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    model = Around()
    model.model.save_pretrained(tmp_path / "base")
    inject_adapters(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter.safetensors")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").touch()
    with pytest.raises(AdapterFileError, match="already exists"):
        merge_files(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged")


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Around()
    model.model.save_pretrained(tmp_path / "base")
    inject_adapters(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path / "adapter.safetensors")

    def stop(name: str) -> None:
        if "layer.1" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged", stop)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter.safetensors", "base"]


def test_a_base_that_holds_the_model_twice_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 8))
    both = nn.ModuleDict({"ema": copy.deepcopy(net), "net": net})
    save_file(both.state_dict(), tmp_path / "base.safetensors")
    inject_adapters(net, LoRAConfig(r=2))
    save_adapter(net, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"several places: 'ema.0.weight', 'net.0.weight'"):
        merge_files(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors")
    assert untouched(tmp_path)


def test_what_was_trained_outside_of_the_model_is_refused(tmp_path: Path) -> None:
    model = Around()
    model.pooler = nn.Linear(16, 16)
    model.model.save_pretrained(tmp_path / "base")
    inject_adapters(model, LoRAConfig(r=2, target_modules=["query"], modules_to_save=["pooler"]))
    save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterMismatchError, match=r"'pooler.weight'.*outside of 'model'"):
        merge_files(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged")
    assert untouched(tmp_path)


def test_diverged_adapters_are_not_merged(tmp_path: Path) -> None:
    model = LitTiny()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1)
    t.fit(model, data())
    model.q_proj.lora_B.data.fill_(float("nan"))  # type: ignore[operator,union-attr]
    t.save_checkpoint(tmp_path / "nan.ckpt")
    with pytest.raises(AdapterFileError, match=r"'q_proj.lora_B' in .* hold NaN"):
        merge_files(tmp_path / "base.safetensors", tmp_path / "nan.ckpt", tmp_path / "merged.safetensors")
    assert untouched(tmp_path)


def test_an_update_that_overflows_is_refused(tmp_path: Path) -> None:
    model = TinyLM(tied=False).half()
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    inject_adapters(model, LoRAConfig(r=2))
    nn.init.constant_(model.q_proj.lora_B, 1e6)  # type: ignore[arg-type]
    save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.raises(AdapterMismatchError, match="values overflow"):
        merge_files(tmp_path / "base.safetensors", tmp_path / "adapter.safetensors", tmp_path / "merged.safetensors")
    assert untouched(tmp_path)


def test_entries_that_are_not_tensors_are_not_lost(tmp_path: Path) -> None:
    class Counting(LitTiny):
        def get_extra_state(self) -> Any:
            return {"n": 4}

        def set_extra_state(self, state: Any) -> None:
            pass

    model = Counting()
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1)
    save_file(LitTiny().state_dict(), tmp_path / "base.safetensors")
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(AdapterFileError, match=r"'_extra_state' in .* not tensors"):
        merge_files(tmp_path / "base.safetensors", tmp_path / "a.ckpt", tmp_path / "merged.safetensors")
    assert untouched(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_update_that_is_rounded_away_is_told_as_by_merge_adapters(tmp_path: Path, dtype: torch.dtype) -> None:
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    model = TinyLM(tied=False).to(dtype)
    save_file(model.state_dict(), base)
    inject_adapters(model, LoRAConfig(r=2))
    randomise(model, scale=1e-3)
    save_adapter(model, adapter)
    told: list[list[str]] = []
    for merge in (lambda: merge_adapters(model), lambda: merge_files(base, adapter, tmp_path / "merged.safetensors")):
        with warnings.catch_warnings(record=True) as noticed:
            warnings.simplefilter("always")
            merge()
        told.append([str(each.message) for each in noticed if each.category is MergePrecisionWarning])
    in_memory, of_files = told
    assert len(in_memory) == len(of_files) == (dtype is torch.bfloat16)
    for one, other in zip(in_memory, of_files, strict=True):
        assert other.startswith(one.replace("TinyLM", str(base)).partition(" Keep")[0])
        assert other.endswith("Merge into the base in float32, or keep the adapters in their own file (load_adapter).")

"""A file of adapters merged into a file of the base."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertModel

import lightning_lora as ll
from lightning_lora.model.view import View
from lightning_lora.storage.offline import tensor_files
from lightning_lora.storage.offline.merge_files import merge_files
from tests.storage.formats.test_export_models import tiny
from tests.storage.offline.test_combine import Several
from tests.support.cases import At
from tests.support.compared import assert_same_state, assert_same_tensors
from tests.support.models import Around, LitTiny, TinyLM, lora, randomise, same, state
from tests.support.storage import fitted, saved


class Mixed(Several):
    """Such layers, one in half precision, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(8, 8).bfloat16()
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)


CONFIGS: dict[str, dict[str, Any]] = {
    "all": {"target_modules": "all"},
    "dora": {"target_modules": ["linear", "narrow", "embed"], "use_dora": True},
    "pissa": {"target_modules": ["linear", "conv"], "init": "pissa"},
    "slices of an attention": {
        "target_modules": ["attention"],
        "target_slices": {"attention": ["q"]},
    },
    "experts": {"target_modules": [], "target_parameters": ["experts.stack"]},
    "biases": {"target_modules": ["linear"], "bias": "all", "use_rslora": True, "alpha": 3},
}


def save_files(folder: Path, model: nn.Module, **config: Any) -> None:
    """Write a base and adapters with random values."""
    save_file(
        {name: value.clone() for name, value in model.state_dict().items()},
        folder / "base.safetensors",
    )
    ll.inject_adapters(model, ll.LoRAConfig(**{"r": 2, **config}))
    randomise(model)
    for p in View(model).trained.values():
        nn.init.uniform_(p)
    ll.save_adapter(model, folder / "adapter.safetensors")


def merged(folder: Path, adapter: str = "adapter.safetensors") -> dict[str, Tensor]:
    merge_files(folder / "base.safetensors", folder / adapter, folder / "merged.safetensors")
    return dict(sorted(load_file(folder / "merged.safetensors").items()))


def refused(
    folder: Path,
    error: Any,
    says: str,
    base: str = "base.safetensors",
    out: str = "merged.safetensors",
) -> None:
    with pytest.raises(error, match=says):
        merge_files(folder / base, folder / "adapter.safetensors", folder / out)
    assert not [file for file in folder.iterdir() if "merged" in file.name]


@pytest.mark.filterwarnings("ignore::lightning_lora.MergePrecisionWarning")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_merged_file_has_the_bits_of_the_merged_model(tmp_path: Path, config: dict[str, Any]) -> None:
    save_files(tmp_path, model := Mixed(), **{"modules_to_save": ["norm"], **config})
    ll.merge_adapters(model)
    found = merged(tmp_path)
    expected = dict(sorted(state(model).items()))
    assert_same_tensors(found, expected)
    assert [value.dtype for value in found.values()] == [expected[name].dtype for name in found]


def test_a_folder_is_merged_as_it_is_divided(tmp_path: Path) -> None:
    model = Around(tiny("Bert", "Model"))
    model.model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    saved(tmp_path / "adapter.safetensors", model, r=2, modules_to_save=["pooler"])
    ll.merge_adapters(model)
    merge_files(tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged")
    loaded = BertModel.from_pretrained(tmp_path / "merged")
    assert_same_state(loaded, model.model)


def test_a_checkpoint_is_merged_into_one_that_lightning_reads(tmp_path: Path) -> None:
    fitted(tmp_path / "base.ckpt", pretrained := LitTiny(), plain=True)
    fitted(tmp_path / "a.ckpt", pretrained)
    merge_files(tmp_path / "base.ckpt", tmp_path / "a.ckpt", tmp_path / "merged.ckpt")
    ll.merge_adapters(pretrained)
    found = LitTiny.load_from_checkpoint(tmp_path / "merged.ckpt")
    assert_same_state(found, pretrained)
    assert not same(state(found), state(LitTiny()))
    assert torch.load(tmp_path / "merged.ckpt", weights_only=True).keys().isdisjoint({"lightning_lora", "callbacks"})


def test_a_new_head_is_added(tmp_path: Path) -> None:
    save_files(tmp_path, model := Mixed(), target_modules=["linear"], modules_to_save=["head"])
    base = load_file(tmp_path / "base.safetensors")
    save_file(
        {n: v for n, v in base.items() if not n.startswith("head")},
        tmp_path / "base.safetensors",
    )
    ll.merge_adapters(model)
    assert_same_tensors(merged(tmp_path), dict(sorted(state(model).items())))


@pytest.mark.filterwarnings("ignore:Code has written:lightning_lora.LoRAWarning")
def test_a_frozen_weight_that_changed_in_training_is_merged_as_it_was_then(tmp_path: Path) -> None:
    base = LitTiny().state_dict()
    save_file({**base, "q_proj.weight": base["q_proj.weight"] + 1}, tmp_path / "base.safetensors")
    changes = At(1, lambda _, model: model.get_parameter("q_proj.weight").data.add_(2))
    model = fitted(tmp_path / "a.ckpt", LitTiny(), lora(), changes)
    assert_same_tensors(merged(tmp_path, adapter="a.ckpt"), dict(sorted(model.state_dict().items())))


@pytest.mark.filterwarnings("ignore::lightning_lora.MergePrecisionWarning")
@pytest.mark.parametrize("narrower", [True, False])
def test_the_same_base_in_another_precision_is_merged_with_a_warning(tmp_path: Path, narrower: bool) -> None:
    there, here = (torch.float32, torch.bfloat16) if narrower else (torch.bfloat16, torch.float32)
    save_files(tmp_path, model := TinyLM(tied=False).to(there), alpha=None)
    base = {name: value.to(here) for name, value in load_file(tmp_path / "base.safetensors").items()}
    save_file(base, tmp_path / "base.safetensors")
    with pytest.warns(ll.LoRAWarning, match="the same base, converted"):
        found = merged(tmp_path)
    assert found["q_proj.weight"].dtype is here
    assert not torch.equal(found["q_proj.weight"], base["q_proj.weight"])
    delta = (model.q_proj.lora_B @ model.q_proj.lora_A).float()  # type: ignore[operator]
    torch.testing.assert_close(found["q_proj.weight"], (base["q_proj.weight"].float() + delta).to(here))


OTHER_BASES: list[tuple[str, Callable[[Tensor], Tensor], str]] = [
    (
        "embed.weight",
        lambda weight: weight + 1,
        "another base: 1 .* such as 'embed.weight'",
    ),
    (
        "linear.weight",
        lambda weight: weight[:4].clone(),
        r"linear.weight \[8, 8\], torch.float32 \[4, 8\]",
    ),
    (
        "linear.weight",
        lambda weight: weight.to(torch.float8_e4m3fn),
        "float8_e4m3fn .* float32, bfloat16",
    ),
    ("linear.weight", lambda weight: weight.to(torch.int8), "torch.int8"),
]


@pytest.mark.parametrize(("name", "change", "says"), OTHER_BASES)
def test_another_base_is_refused(tmp_path: Path, name: str, change: Any, says: str) -> None:
    save_files(tmp_path, Mixed(), target_modules=["linear"])
    base = load_file(tmp_path / "base.safetensors")
    save_file({**base, name: change(base[name])}, tmp_path / "base.safetensors")
    refused(
        tmp_path,
        ll.AdapterMismatchError if name == "linear.weight" else ll.BaseMismatchError,
        says,
    )


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    save_files(tmp_path, TinyLM(), target_modules=["embed"])
    refused(tmp_path, ll.AdapterMismatchError, r"'embed.weight' are tied.*merge_adapters")


class Two(nn.Module):
    """Two layers, of which the second may be known under a second name."""

    def __init__(self, *, is_tied: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)
        if is_tied:
            self.c = self.b


def test_a_base_that_lacks_a_tensor_of_the_trainings_is_refused(tmp_path: Path) -> None:
    save_files(tmp_path, Two(), target_modules=["a"])
    path = tmp_path / "base.safetensors"
    base = load_file(path)
    save_file({name: value for name, value in base.items() if name != "b.weight"}, path)
    refused(tmp_path, ll.BaseMismatchError, "lacks 'b.weight', which the base of the adapters")
    save_file(base, path)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"b.weight")] ^= 4
    path.write_bytes(damaged)
    assert "f.weight" in load_file(path)
    refused(tmp_path, ll.BaseMismatchError, "lacks 'b.weight', which the base of the adapters")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_a_tensor_that_a_library_knows_by_another_name_is_no_other_base(tmp_path: Path, dtype: torch.dtype) -> None:
    """As files of BERT have gamma, which transformers reads as weight."""
    save_files(tmp_path, Two(), target_modules=["a"])
    base = {name: value.to(dtype) for name, value in load_file(tmp_path / "base.safetensors").items()}
    save_file(
        {name.replace("b.weight", "b.gamma"): value for name, value in base.items()},
        tmp_path / "base.safetensors",
    )
    assert torch.equal(merged(tmp_path)["b.gamma"], base["b.weight"])


def test_a_tied_tensor_may_be_there_under_one_of_its_names(tmp_path: Path) -> None:
    save_files(tmp_path, Two(is_tied=True), target_modules=["a"])
    base = load_file(tmp_path / "base.safetensors")
    save_file(
        {name: value for name, value in base.items() if name[0] != "c"},
        tmp_path / "base.safetensors",
    )
    assert merged(tmp_path).keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}


BITS: dict[str, bytes] = {"a hyperparameter": b"gain", "a name": b"b.weight"}


@pytest.mark.parametrize("place", BITS.values(), ids=BITS)
def test_a_bit_of_a_base_that_is_a_checkpoint_is_noticed(tmp_path: Path, place: bytes) -> None:
    save_files(tmp_path, Two(), target_modules=["a"])
    torch.save(
        {"state_dict": Two().state_dict(), "hyper_parameters": {"gain": 1.5}},
        path := tmp_path / "base.ckpt",
    )
    contents = bytearray(path.read_bytes())
    contents[contents.index(place)] ^= 1
    path.write_bytes(contents)
    refused(tmp_path, ll.AdapterFileError, "is damaged", base="base.ckpt", out="merged.ckpt")


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    save_files(tmp_path, Mixed(), target_modules=["linear"])
    (tmp_path / "empty").mkdir()
    torch.save([1], tmp_path / "list.pt")
    refused(tmp_path, FileNotFoundError, "nothing", base="nothing.safetensors")
    refused(tmp_path, ll.AdapterFileError, "neither", base="empty", out="merged")
    refused(tmp_path, ll.AdapterFileError, "cannot be written from", out="merged.ckpt")
    refused(tmp_path, ll.AdapterFileError, "no weights", base="list.pt", out="merged.ckpt")


def test_a_base_that_holds_the_model_twice_is_refused(tmp_path: Path) -> None:
    save_files(tmp_path, nn.Sequential(nn.Linear(8, 8)))
    net = load_file(tmp_path / "base.safetensors")
    both = {f"{part}.{name}": value.clone() for part in ("ema", "net") for name, value in net.items()}
    save_file(both, tmp_path / "base.safetensors")
    refused(tmp_path, ll.AdapterMismatchError, r"several places: 'ema.0.weight', 'net.0.weight'")


def test_what_was_trained_outside_of_the_model_is_refused(tmp_path: Path) -> None:
    model = Around(tiny("Bert", "Model"))
    model.pooler = nn.Linear(4, 4)
    model.model.save_pretrained(tmp_path / "base")
    save_files(tmp_path, model, target_modules=["query"], modules_to_save=["pooler"])
    refused(
        tmp_path,
        ll.AdapterMismatchError,
        r"'pooler.weight'.*outside of 'model'",
        base="base",
        out="merged",
    )


def test_a_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[Path]()

    def counted(file: Path, *args: Any) -> Any:
        opened.append(file)
        return safe_open(file, *args)

    monkeypatch.setattr(tensor_files, "safe_open", counted)
    save_files(tmp_path, LitTiny())
    merged(tmp_path)
    assert opened == [tmp_path / "base.safetensors"]  # its header may be long


def test_an_update_that_half_precision_cannot_hold_is_told_or_refused(tmp_path: Path) -> None:
    save_files(tmp_path, model := TinyLM(tied=False).half())
    randomise(model, scale=1e-3)
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    with pytest.warns(ll.MergePrecisionWarning, match="in 2 of 2 layers.*into the base in float32"):
        merged(tmp_path)
    (tmp_path / "merged.safetensors").unlink()
    nn.init.constant_(model.q_proj.lora_B, 1e9)  # type: ignore[arg-type]
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    refused(tmp_path, ll.AdapterMismatchError, "values overflow")


def test_a_pipe_as_base_is_refused(tmp_path: Path) -> None:
    save_files(tmp_path, LitTiny(), r=2)
    os.mkfifo(tmp_path / "pipe.ckpt")  # to open it would wait for ever
    with pytest.raises(ll.AdapterFileError, match=r"pipe\.ckpt is a pipe or a device, not a file"):
        merge_files(tmp_path / "pipe.ckpt", tmp_path / "a.safetensors", tmp_path / "out.ckpt")


@pytest.mark.parametrize("value", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128)])
def test_a_tensor_that_safetensors_cannot_hold_is_named(tmp_path: Path, value: Tensor) -> None:
    model = LitTiny()
    torch.save({**model.state_dict(), "odd": value}, tmp_path / "base.ckpt")
    ll.save_adapter(saved(tmp_path / "a.safetensors", model), tmp_path / "a.safetensors")
    with pytest.raises(ll.AdapterFileError, match=r"safetensors cannot hold 'odd' .*such as \.ckpt"):
        merge_files(tmp_path / "base.ckpt", tmp_path / "a.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    merge_files(tmp_path / "base.ckpt", tmp_path / "a.safetensors", tmp_path / "out.ckpt")


class Counts(LitTiny):
    """It keeps a number besides its tensors, which training changes."""

    steps = 0

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, held: dict[str, int]) -> None:
        self.steps = held["steps"]


def test_what_is_no_tensor_is_never_lost_in_a_merge(tmp_path: Path) -> None:
    model = Counts()
    torch.save(model.state_dict(), tmp_path / "base.ckpt")
    fitted(tmp_path / "a.ckpt", model)
    with pytest.raises(
        ll.AdapterFileError,
        match=r"'_extra_state' in .* are not tensors.*\.ckpt.*save_merged",
    ):
        merge_files(tmp_path / "base.ckpt", tmp_path / "a.ckpt", tmp_path / "out.safetensors")
    merge_files(tmp_path / "base.ckpt", tmp_path / "a.ckpt", tmp_path / "out.ckpt")
    assert torch.load(tmp_path / "out.ckpt", weights_only=True)["_extra_state"] == {"steps": model.steps}

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
from tests.support.parameters import cloned
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
    "biases": {
        "target_modules": ["linear"],
        "bias": "all",
        "use_rslora": True,
        "alpha": 3,
    },
}


def without(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name not in names}


def converted(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) for name, value in tensors.items()}


def in_order(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(sorted(tensors.items()))


def save_files(folder: Path, model: nn.Module, **config: Any) -> None:
    """Write a base and adapters with random values."""
    save_file(cloned(model.state_dict()), folder / "base.safetensors")
    ll.inject_adapters(model, ll.LoRAConfig(**{"r": 2, **config}))
    randomise(model)
    for p in View(model).trainable_base.values():
        nn.init.uniform_(p)
    ll.save_adapter(model, folder / "adapter.safetensors")


def merged(folder: Path, adapter: str = "adapter.safetensors") -> dict[str, Tensor]:
    out = folder / "merged.safetensors"
    merge_files(folder / "base.safetensors", folder / adapter, out)
    return in_order(load_file(out))


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
def test_the_merged_file_has_the_bits_of_the_merged_model(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    model = Mixed()
    save_files(tmp_path, model, **{"modules_to_save": ["norm"], **config})
    ll.merge_adapters(model)
    found = merged(tmp_path)
    expected = in_order(state(model))
    assert_same_tensors(found, expected)
    for name, value in found.items():
        assert value.dtype == expected[name].dtype


def test_a_folder_is_merged_as_it_is_divided(tmp_path: Path) -> None:
    model = Around(tiny("Bert", "Model"))
    model.model.save_pretrained(tmp_path / "base", max_shard_size="5KB")
    saved(tmp_path / "adapter.safetensors", model, r=2, modules_to_save=["pooler"])
    ll.merge_adapters(model)
    merge_files(
        tmp_path / "base", tmp_path / "adapter.safetensors", tmp_path / "merged"
    )
    loaded = BertModel.from_pretrained(tmp_path / "merged")
    assert_same_state(loaded, model.model)


def test_a_checkpoint_is_merged_into_one_that_lightning_reads(tmp_path: Path) -> None:
    out = tmp_path / "merged.ckpt"
    pretrained = LitTiny()
    fitted(tmp_path / "base.ckpt", pretrained, plain=True)
    fitted(tmp_path / "a.ckpt", pretrained)
    merge_files(tmp_path / "base.ckpt", tmp_path / "a.ckpt", out)
    ll.merge_adapters(pretrained)
    found = LitTiny.load_from_checkpoint(out)
    assert_same_state(found, pretrained)
    assert not same(state(found), state(LitTiny()))
    entries = torch.load(out, weights_only=True)
    assert "lightning_lora" not in entries
    assert "callbacks" not in entries


def test_a_new_head_is_added(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    model = Mixed()
    save_files(tmp_path, model, target_modules=["linear"], modules_to_save=["head"])
    save_file(without(load_file(path), "head.weight", "head.bias"), path)
    ll.merge_adapters(model)
    assert_same_tensors(merged(tmp_path), in_order(state(model)))


@pytest.mark.filterwarnings("ignore:Code has written:lightning_lora.LoRAWarning")
def test_a_frozen_weight_that_changed_in_training_is_merged_as_it_was_then(
    tmp_path: Path,
) -> None:
    base = LitTiny().state_dict()
    save_file(
        {**base, "q_proj.weight": base["q_proj.weight"] + 1},
        tmp_path / "base.safetensors",
    )
    changes = At(1, lambda _, model: model.get_parameter("q_proj.weight").data.add_(2))
    model = fitted(tmp_path / "a.ckpt", LitTiny(), lora(), changes)
    assert_same_tensors(
        merged(tmp_path, adapter="a.ckpt"), dict(sorted(model.state_dict().items()))
    )


@pytest.mark.filterwarnings("ignore::lightning_lora.MergePrecisionWarning")
@pytest.mark.parametrize(
    ("there", "here"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_the_same_base_in_another_precision_is_merged_with_a_warning(
    tmp_path: Path, there: torch.dtype, here: torch.dtype
) -> None:
    path = tmp_path / "base.safetensors"
    model: Any = TinyLM(tied=False).to(there)
    save_files(tmp_path, model, alpha=None)
    base = converted(load_file(path), here)
    save_file(base, path)
    with pytest.warns(ll.LoRAWarning, match="the same base, converted"):
        found = merged(tmp_path)["q_proj.weight"]
    plain = base["q_proj.weight"]
    assert found.dtype is here
    assert not torch.equal(found, plain)
    delta = (model.q_proj.lora_B @ model.q_proj.lora_A).float()
    torch.testing.assert_close(found, (plain.float() + delta).to(here))


OTHER_BASES: list[tuple[str, Callable[[Tensor], Tensor], type[Exception], str]] = [
    (
        "embed.weight",
        lambda weight: weight + 1,
        ll.BaseMismatchError,
        "another base: 1 .* such as 'embed.weight'",
    ),
    (
        "linear.weight",
        lambda weight: weight[:4].clone(),
        ll.AdapterMismatchError,
        r"linear.weight \[8, 8\], torch.float32 \[4, 8\]",
    ),
    (
        "linear.weight",
        lambda weight: weight.to(torch.float8_e4m3fn),
        ll.AdapterMismatchError,
        "float8_e4m3fn .* float32, bfloat16",
    ),
    (
        "linear.weight",
        lambda weight: weight.to(torch.int8),
        ll.AdapterMismatchError,
        "torch.int8",
    ),
]


@pytest.mark.parametrize(("name", "change", "error", "says"), OTHER_BASES)
def test_another_base_is_refused(
    tmp_path: Path, name: str, change: Any, error: Any, says: str
) -> None:
    path = tmp_path / "base.safetensors"
    save_files(tmp_path, Mixed(), target_modules=["linear"])
    base = load_file(path)
    base[name] = change(base[name])
    save_file(base, path)
    refused(tmp_path, error, says)


def test_a_base_that_was_quantised_as_a_whole_cannot_be_compared(
    tmp_path: Path,
) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 64)
    layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    save_files(tmp_path, nn.Sequential(layer.to("cpu")))
    save_file({"0.weight": weight}, tmp_path / "base.safetensors")
    refused(
        tmp_path,
        ll.BaseMismatchError,
        "Nothing in .* can be compared .* were quantised. Merge in memory",
    )


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    save_files(tmp_path, TinyLM(), target_modules=["embed"])
    refused(
        tmp_path, ll.AdapterMismatchError, r"'embed.weight' are tied.*merge_adapters"
    )


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


LACKS = "lacks 'b.weight', which the base of the adapters"


def test_a_base_that_lacks_a_tensor_of_the_trainings_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_files(tmp_path, Two(), target_modules=["a"])
    save_file(without(load_file(path), "b.weight"), path)
    refused(tmp_path, ll.BaseMismatchError, LACKS)


def test_a_base_with_a_damaged_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_files(tmp_path, Two(), target_modules=["a"])
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b"b.weight")] ^= 4
    path.write_bytes(damaged)
    assert "f.weight" in load_file(path)
    refused(tmp_path, ll.BaseMismatchError, LACKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_a_tensor_that_a_library_knows_by_another_name_is_no_other_base(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """As files of BERT have gamma, which transformers reads as weight."""
    path = tmp_path / "base.safetensors"
    save_files(tmp_path, Two(), target_modules=["a"])
    base = converted(load_file(path), dtype)
    weight = base.pop("b.weight")
    save_file({**base, "b.gamma": weight}, path)
    assert torch.equal(merged(tmp_path)["b.gamma"], weight)


def test_a_tied_tensor_may_be_there_under_one_of_its_names(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_files(tmp_path, Two(is_tied=True), target_modules=["a"])
    save_file(without(load_file(path), "c.weight", "c.bias"), path)
    assert merged(tmp_path).keys() == {"a.weight", "a.bias", "b.weight", "b.bias"}


BITS: dict[str, bytes] = {"a hyperparameter": b"gain", "a name": b"b.weight"}


@pytest.mark.parametrize("place", BITS.values(), ids=BITS)
def test_a_bit_of_a_base_that_is_a_checkpoint_is_noticed(
    tmp_path: Path, place: bytes
) -> None:
    path = tmp_path / "base.ckpt"
    save_files(tmp_path, Two(), target_modules=["a"])
    checkpoint = {"state_dict": Two().state_dict(), "hyper_parameters": {"gain": 1.5}}
    torch.save(checkpoint, path)
    contents = bytearray(path.read_bytes())
    contents[contents.index(place)] ^= 1
    path.write_bytes(contents)
    refused(
        tmp_path, ll.AdapterFileError, "is damaged", base="base.ckpt", out="merged.ckpt"
    )


def test_files_in_the_wrong_order_are_refused_with_the_right_one(
    tmp_path: Path,
) -> None:
    save_files(tmp_path, Mixed(), target_modules=["linear"])
    base, adapter = tmp_path / "base.safetensors", tmp_path / "adapter.safetensors"
    says = r"adapter.* holds adapters, and .*base.* holds none\. Give the base first"
    with pytest.raises(ll.AdapterFileError, match=says):
        merge_files(adapter, base, tmp_path / "out.safetensors")


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    save_files(tmp_path, Mixed(), target_modules=["linear"])
    (tmp_path / "empty").mkdir()
    torch.save([1], tmp_path / "list.pt")
    refused(tmp_path, FileNotFoundError, "nothing", base="nothing.safetensors")
    refused(tmp_path, ll.AdapterFileError, "neither", base="empty", out="merged")
    refused(tmp_path, ll.AdapterFileError, "cannot be written from", out="merged.ckpt")
    refused(
        tmp_path, ll.AdapterFileError, "no weights", base="list.pt", out="merged.ckpt"
    )


def prefixed(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name}": value.clone() for name, value in tensors.items()}


def test_a_base_that_holds_the_model_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    save_files(tmp_path, nn.Sequential(nn.Linear(8, 8)))
    net = load_file(path)
    save_file(prefixed("ema", net) | prefixed("net", net), path)
    refused(
        tmp_path,
        ll.AdapterMismatchError,
        r"several places: 'ema.0.weight', 'net.0.weight'",
    )


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


def test_an_update_that_half_precision_cannot_hold_is_told_or_refused(
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "adapter.safetensors"
    model: Any = TinyLM(tied=False).half()
    save_files(tmp_path, model)
    randomise(model, scale=1e-3)
    ll.save_adapter(model, adapter)
    with pytest.warns(
        ll.MergePrecisionWarning, match="in 2 of 2 layers.*into the base in float32"
    ):
        merged(tmp_path)
    (tmp_path / "merged.safetensors").unlink()
    nn.init.constant_(model.q_proj.lora_B, 1e9)
    ll.save_adapter(model, adapter)
    refused(tmp_path, ll.AdapterMismatchError, "values overflow")


def test_a_pipe_as_base_is_refused(tmp_path: Path) -> None:
    save_files(tmp_path, LitTiny(), r=2)
    os.mkfifo(tmp_path / "pipe.ckpt")  # to open it would wait for ever
    with pytest.raises(
        ll.AdapterFileError, match=r"pipe\.ckpt is a pipe or a device, not a file"
    ):
        merge_files(
            tmp_path / "pipe.ckpt", tmp_path / "a.safetensors", tmp_path / "out.ckpt"
        )


@pytest.mark.parametrize(
    "value", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex128)]
)
def test_a_tensor_that_safetensors_cannot_hold_is_named(
    tmp_path: Path, value: Tensor
) -> None:
    model = LitTiny()
    torch.save({**model.state_dict(), "odd": value}, tmp_path / "base.ckpt")
    ll.save_adapter(
        saved(tmp_path / "a.safetensors", model), tmp_path / "a.safetensors"
    )
    with pytest.raises(
        ll.AdapterFileError, match=r"safetensors cannot hold 'odd' .*such as \.ckpt"
    ):
        merge_files(
            tmp_path / "base.ckpt",
            tmp_path / "a.safetensors",
            tmp_path / "out.safetensors",
        )
    assert not (tmp_path / "out.safetensors").exists()
    merge_files(
        tmp_path / "base.ckpt", tmp_path / "a.safetensors", tmp_path / "out.ckpt"
    )


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
        merge_files(
            tmp_path / "base.ckpt", tmp_path / "a.ckpt", tmp_path / "out.safetensors"
        )
    merge_files(tmp_path / "base.ckpt", tmp_path / "a.ckpt", tmp_path / "out.ckpt")
    assert torch.load(tmp_path / "out.ckpt", weights_only=True)["_extra_state"] == {
        "steps": model.steps
    }

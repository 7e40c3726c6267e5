"""What is written never costs what it is made from, and is there complete or not at all."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_lora as ll
from lightning_lora.storage.offline.combine_files import combine_files
from lightning_lora.storage.offline.merge_files import merge_files
from tests.support.faults import contents, fork, forking, in_fork, limit, read_only
from tests.support.models import as_trained


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where all happens: bases in every form, and adapters where an output may be wanted."""
    monkeypatch.chdir(tmp_path)
    state = model().state_dict()
    for name in ("base", "peft"):
        (tmp_path / name).mkdir()
    for name in ("base.safetensors", "base/model.safetensors"):
        save_file(state, tmp_path / name, metadata={"format": "pt"})
    torch.save(state, tmp_path / "base.ckpt")
    for name in ("a.safetensors", "b.safetensors", "peft/adapter_model.safetensors"):
        ll.save_adapter(as_trained(model()), tmp_path / name)
    for name in ("base.safetensors", "a.safetensors"):
        (tmp_path / f"link.{name}").symlink_to(name)
        os.link(tmp_path / name, tmp_path / f"hard.{name}")
    return tmp_path


def merge(base: str, adapter: str, out: str) -> None:
    merge_files(Path(base), Path(adapter), Path(out))


def combine(*names: str) -> None:
    combine_files(list(map(Path, names[:-1])), Path(names[-1]), (1.0, 1.0))


OVER: list[tuple[Callable[..., object], list[str]]] = [
    *((merge, ["base.safetensors", "a.safetensors", f"{way}base.safetensors"]) for way in ("", "link.", "hard.")),
    *((merge, ["base.safetensors", "a.safetensors", f"{way}a.safetensors"]) for way in ("", "link.", "base/../")),
    (merge, ["link.base.safetensors", "a.safetensors", "base.safetensors"]),
    (merge, ["base.ckpt", "a.safetensors", "base.ckpt"]),
    (merge, ["base", "a.safetensors", "base/new"]),
    (combine, ["a.safetensors", "b.safetensors", "b.safetensors"]),
    (combine, ["link.a.safetensors", "b.safetensors", "a.safetensors"]),
    (ll.export_peft, ["peft/adapter_model.safetensors", "peft"]),
]


@pytest.mark.parametrize(("write", "names"), OVER)
def test_no_result_is_written_over_what_it_is_made_from(folder: Path, write: Any, names: list[str]) -> None:
    before = contents(folder)
    with pytest.raises(ll.AdapterFileError, match=r"would be written over .* Choose another place"):
        write(*names)
    assert contents(folder) == before


def test_a_result_may_replace_an_older_one(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        merge("base.safetensors", name, "out.safetensors")
        ll.export_peft(folder / name, folder / "new")


# Killed


class Own(nn.Sequential):
    """A model that a process is killed in, while it saves itself."""

    dies = False

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.state_dict(), folder / "model.safetensors")
        if self.dies:
            signal.raise_signal(signal.SIGPROF)


@forking
@pytest.mark.parametrize("write", ["merge", "save_merged"])
def test_what_a_killed_writer_of_a_folder_left_is_cleared_by_the_next(folder: Path, write: str) -> None:
    saved = Own(*model())
    ll.inject_adapters(saved, ll.LoRAConfig(r=2))

    def work(dies: bool = True) -> None:
        saved.dies = dies
        if write == "merge":
            die = (lambda name: signal.raise_signal(signal.SIGPROF)) if dies else str
            merge_files(folder / "base", folder / "a.safetensors", folder / "out", die)
        else:
            ll.save_merged(saved, folder / "out")

    before = contents(folder)
    assert fork(work) == signal.SIGPROF
    assert not (folder / "out").exists() and contents(folder) != before  # a part of it is there
    work(dies=False)
    assert {Path(name).parts[0] for name in contents(folder)} - {Path(name).parts[0] for name in before} == {"out"}


# The disk


@pytest.mark.parametrize("name", ["out.safetensors", "out.ckpt", "out"])
@in_fork
def test_a_full_disk_is_named_as_the_reason(tmp_path: Path, name: str) -> None:
    saved = L.LightningModule()
    saved.net = Own(nn.Linear(64, 64))
    ll.inject_adapters(saved, ll.LoRAConfig(r=2))
    limit(1000)
    with pytest.raises(ll.AdapterFileError, match=rf"{re.escape(name)} could not be written .*Free space"):
        ll.save_merged(saved, tmp_path / name)
    assert not list(tmp_path.iterdir())


@in_fork
def test_a_folder_of_peft_that_cannot_be_made_is_told_with_what_to_do(tmp_path: Path) -> None:
    with read_only(tmp_path), pytest.raises(ll.AdapterFileError, match=r"peft could not be written .*Free space"):
        ll.export_peft(as_trained(model()), tmp_path / "peft")


def test_an_error_of_a_model_that_saves_itself_is_told(tmp_path: Path) -> None:
    class Raises(nn.Sequential):
        def save_pretrained(self, folder: Path) -> None:
            raise RuntimeError("my own")

    ll.inject_adapters(saved := Raises(nn.Linear(4, 4)), ll.LoRAConfig(r=2))
    with pytest.raises(ll.AdapterFileError, match=r"could not be written \(RuntimeError: my own\)"):
        ll.save_merged(saved, tmp_path / "out")


WRITERS: dict[str, Callable[[Path, str], object]] = {
    "save_adapter": lambda folder, name: ll.save_adapter(as_trained(model()), f"{folder}/{name}.safetensors"),
    "save_merged": lambda folder, name: ll.save_merged(as_trained(model()), f"{folder}/{name}.safetensors"),
    "export_peft": lambda folder, name: ll.export_peft(as_trained(model()), f"{folder}/{name}"),
    "merge": lambda folder, name: merge("base.safetensors", "a.safetensors", name),
    "combine": lambda folder, name: combine(*["a.safetensors"] * 2, f"{name}.safetensors"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_name_that_no_file_can_have_is_refused(folder: Path, write: Any) -> None:
    with pytest.raises(ll.AdapterFileError, match=r"'.*a\\x00b.*' holds a NUL character"):
        write(folder, "a\0b")


# What cannot be computed or held


def of_dtype(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(8, 8).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.int8], ids=str)
def test_an_adapted_weight_that_takes_no_update_is_named(folder: Path, dtype: torch.dtype) -> None:
    save_file({**model().state_dict(), "0.weight": of_dtype(dtype)}, folder / "other.safetensors")
    with pytest.raises(ll.AdapterMismatchError, match=rf"no update: '0.weight \[8, 8\], {dtype} .* float32, bfloat16"):
        merge("other.safetensors", "a.safetensors", "out.safetensors")
    assert not (folder / "out.safetensors").exists()


BESIDE: dict[str, tuple[torch.Tensor, bool]] = {
    "float8": (of_dtype(torch.float8_e4m3fn), True),
    "uint16": (of_dtype(torch.uint16), True),
    "complex128": (of_dtype(torch.complex128), False),
    "sparse": (torch.eye(8).to_sparse(), False),
}
if hasattr(torch, "float4_e2m1fn_x2"):  # from torch 2.8 on
    BESIDE["float4"] = (torch.arange(64, dtype=torch.uint8).view(8, 8).view(torch.float4_e2m1fn_x2), True)


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|quantize|ComplexHalf)")
@pytest.mark.parametrize(("value", "fits"), BESIDE.values(), ids=BESIDE)
def test_a_tensor_beside_is_kept_bit_for_bit_or_named(folder: Path, value: torch.Tensor, fits: bool) -> None:
    base = {**model().state_dict(), "beside": value}
    torch.save(base, folder / "other.ckpt")
    if fits:
        save_file(base, folder / "other.safetensors")
    merge("other.ckpt", "a.safetensors", "out.ckpt")
    kept = torch.load(folder / "out.ckpt", weights_only=True)["beside"]
    assert (kept.dtype, kept.layout, kept.shape) == (value.dtype, value.layout, value.shape)
    if not fits:
        with pytest.raises(ll.AdapterFileError, match=r"safetensors cannot hold 'beside' \(torch\..*\.ckpt"):
            merge("other.ckpt", "a.safetensors", "out.safetensors")
        assert not (folder / "out.safetensors").exists()
        return
    for there in ("other.ckpt", "other.safetensors"):
        merge(there, "a.safetensors", "out.safetensors")
        found = load_file(folder / "out.safetensors")["beside"]
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert torch.equal(found.view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_checkpoint_stays_of_its_kind_with_entries_that_are_no_tensors(folder: Path, is_plain: bool) -> None:
    base = {**model().state_dict(), "extra": {"n": 1}}
    torch.save(base if is_plain else {"state_dict": base, "mine": 2}, folder / "other.ckpt")
    merge("other.ckpt", "a.safetensors", "out.ckpt")
    found = torch.load(folder / "out.ckpt", weights_only=True)
    assert is_plain or found.pop("mine") == 2
    state = found if is_plain else found["state_dict"]
    assert state.keys() == base.keys() and state["extra"] == {"n": 1}
    merge("base.safetensors", "a.safetensors", "out.safetensors")
    assert torch.equal(state["0.weight"], load_file(folder / "out.safetensors")["0.weight"])


def test_a_packed_base_is_refused_before_it_is_unpacked(folder: Path) -> None:
    torch.save({"0.weight": torch.zeros(1 << 20)}, folder / "whole.ckpt")
    with ZipFile(folder / "whole.ckpt") as whole, ZipFile(folder / "other.ckpt", "w", ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(ll.AdapterFileError, match="is damaged"):
        merge("other.ckpt", "a.safetensors", "out.ckpt")


def test_a_tensor_that_repeats_a_few_values_is_refused(folder: Path) -> None:
    torch.save({**model().state_dict(), "beside": torch.zeros(1).expand(1 << 35)}, folder / "other.ckpt")
    for out in ("out.ckpt", "out.safetensors"):
        with pytest.raises(ll.AdapterFileError, match=r"'beside' in .* larger than the file itself"):
            merge("other.ckpt", "a.safetensors", out)


def test_adapters_that_are_not_there_are_not_found(folder: Path) -> None:
    for name in ("gone", "a\0b"):
        with pytest.raises((FileNotFoundError, ll.AdapterFileError)):
            merge(f"{folder}/base.safetensors", f"{folder}/{name}", f"{folder}/out.safetensors")

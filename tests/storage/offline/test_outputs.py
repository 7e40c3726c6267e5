"""What is written never costs what it is made from, and is there complete or not at all."""

import os
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lightning_lora as ll
from lightning_lora.layers.kinds import LoRALinear
from lightning_lora.storage.offline.combine_files import combine_files
from lightning_lora.storage.offline.merge_files import merge_files
from tests.support.faults import contents, in_fork, limit
from tests.support.models import as_trained


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where all happens: bases in every form, and adapters where an output may be wanted."""
    monkeypatch.chdir(tmp_path)
    state = model().state_dict()
    (tmp_path / "base").mkdir()
    save_file(state, tmp_path / "base.safetensors", metadata={"format": "pt"})
    save_file(state, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    ll.save_adapter(as_trained(model()), tmp_path / "a.safetensors")
    ll.save_adapter(as_trained(model()), tmp_path / "b.safetensors")
    for name in ("base.safetensors", "a.safetensors"):
        (tmp_path / f"link.{name}").symlink_to(name)
        os.link(tmp_path / name, tmp_path / f"hard.{name}")
    return tmp_path


def merge(base: str, adapter: str, out: str) -> None:
    merge_files(Path(base), Path(adapter), Path(out))


def combine(one: str, other: str, out: str) -> None:
    combine_files([Path(one), Path(other)], Path(out), (1.0, 1.0))


OVER: list[tuple[Callable[..., object], list[str]]] = [
    (merge, ["base.safetensors", "a.safetensors", "base.safetensors"]),
    (merge, ["base.safetensors", "a.safetensors", "link.base.safetensors"]),
    (merge, ["base.safetensors", "a.safetensors", "hard.base.safetensors"]),
    (merge, ["base.safetensors", "a.safetensors", "base/../a.safetensors"]),
    (merge, ["base", "a.safetensors", "base/new"]),
    (combine, ["link.a.safetensors", "b.safetensors", "a.safetensors"]),
    (merge, ["base.safetensors", "a.safetensors", "b.safetensors"]),  # other adapters
]


@pytest.mark.parametrize(("write", "names"), OVER)
def test_no_result_is_written_over_what_it_is_made_from(
    folder: Path, write: Any, names: list[str]
) -> None:
    before = contents(folder)
    with pytest.raises(
        (ll.AdapterFileError, FileExistsError),
        match=r"over .* Choose another|b.* holds adapters",
    ):
        write(*names)
    assert contents(folder) == before


class Own(nn.Sequential):  # a model that saves itself, if it can
    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        save_file(self.state_dict(), folder / "model.safetensors")


@pytest.mark.parametrize("name", ["out.safetensors", "out.ckpt", "out"])
@in_fork
def test_a_full_disk_is_named_as_the_reason(tmp_path: Path, name: str) -> None:
    saved = L.LightningModule()
    saved.net = Own(nn.Linear(64, 64))
    as_trained(saved)
    limit(1000)
    with pytest.raises(
        ll.AdapterFileError,
        match=rf"{re.escape(name)} could not be written .*Free space",
    ):
        ll.save_merged(saved, tmp_path / name)
    assert not list(tmp_path.iterdir())


BESIDE: dict[str, torch.Tensor] = {
    "float8": torch.zeros(8, 8).to(torch.float8_e4m3fn),
    "uint16": torch.zeros(8, 8).to(torch.uint16),
}
if hasattr(torch, "float4_e2m1fn_x2"):  # from torch 2.8 on
    BESIDE["float4"] = (
        torch.arange(64, dtype=torch.uint8).view(8, 8).view(torch.float4_e2m1fn_x2)
    )


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|quantize)")
@pytest.mark.parametrize("value", BESIDE.values(), ids=BESIDE)
def test_a_tensor_beside_is_kept_bit_for_bit(folder: Path, value: torch.Tensor) -> None:
    torch.save({**model().state_dict(), "beside": value}, folder / "other.ckpt")
    merge("other.ckpt", "a.safetensors", "out.ckpt")
    kept = torch.load(folder / "out.ckpt", weights_only=True)["beside"]
    assert kept.layout == value.layout
    assert_same_bits(kept, value)
    merge("other.ckpt", "a.safetensors", "out.safetensors")
    found = load_file(folder / "out.safetensors")["beside"]
    assert_same_bits(found, value)


def test_tensors_are_aligned_behind_those_of_odd_sizes(folder: Path) -> None:
    base = {
        "0": torch.ones(3, dtype=torch.bool),
        **model().state_dict(),
        "9": torch.zeros(5, dtype=torch.float16),
    }
    save_file(base, folder / "odd.safetensors")
    merge("odd.safetensors", "a.safetensors", "out.safetensors")
    found = load_file(folder / "out.safetensors")
    assert found.keys() == base.keys()
    for value in found.values():
        assert value.data_ptr() % value.itemsize == 0


def checkpoint_of(state: dict[str, Any]) -> dict[str, Any]:
    return {"state_dict": state, "mine": 2}


def merged_through(folder: Path, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The same checkpoint with merged weights."""
    torch.save(checkpoint, folder / "other.ckpt")
    merge("other.ckpt", "a.safetensors", "out.ckpt")
    return torch.load(folder / "out.ckpt", weights_only=True)


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_checkpoint_stays_of_its_kind_with_entries_that_are_no_tensors(
    folder: Path, is_plain: bool
) -> None:
    base = {**model().state_dict(), "extra": {"n": 1}}
    if is_plain:
        state = merged_through(folder, base)
    else:
        found = merged_through(folder, checkpoint_of(base))
        assert found["mine"] == 2
        state = found["state_dict"]
    assert state.keys() == base.keys()
    assert state["extra"] == {"n": 1}
    merge("base.safetensors", "a.safetensors", "out.safetensors")
    expected = load_file(folder / "out.safetensors")
    assert torch.equal(state["0.weight"], expected["0.weight"])


@pytest.fixture
def most_at_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many merged weights were in memory, at the end of each computation of one."""
    counts = list[int]()
    alive = list[weakref.ref[torch.Tensor]]()
    compute = LoRALinear.lora_merged_weight

    def counted(layer: Any, weight: str) -> Any:
        merged, lost_share = compute(layer, weight)
        alive.append(weakref.ref(merged))
        in_memory = [each for each in alive if each() is not None]
        counts.append(len(in_memory))
        return merged, lost_share

    monkeypatch.setattr(LoRALinear, "lora_merged_weight", counted)
    return counts


@pytest.mark.parametrize("out", ["out.ckpt", "out.safetensors"])
def test_a_checkpoint_is_merged_with_one_weight_in_memory(
    folder: Path, most_at_once: list[int], out: str
) -> None:
    torch.save(checkpoint_of(model().state_dict()), folder / "base.ckpt")
    files = set(contents(folder))
    merge("base.ckpt", "a.safetensors", out)
    assert most_at_once == [1, 1]
    assert set(contents(folder)) == {*files, out}  # what held the others is gone

"""Files that are damaged, or were changed, are refused.

Those of other versions are read.
"""

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lightning_lora as ll
from lightning_lora.cli.main import main
from lightning_lora.storage.checksum import FORMAT
from tests.support import faults
from tests.support.compared import assert_state
from tests.support.models import LitTiny, state
from tests.support.storage import restores, rewrite, saved, set_checksum

pytestmark = faults.forks


# Damaged files


KINDS = pytest.mark.parametrize("kind", ["safetensors", "ckpt"])


def cuts(size: int) -> list[int]:
    """Where a file is cut: near its beginning and its end, and in between."""
    places = {*range(12), *range(0, size, size // 20), *range(size - 70, size, 14)}
    return sorted(places | {size - 1})


@KINDS
def test_truncated_file_is_refused_wherever_it_is_cut(
    tmp_path: Path, good: Path, kind: str
) -> None:
    content = (good / f"good.{kind}").read_bytes()
    path = tmp_path / f"cut.{kind}"
    size = len(content)
    for cut in cuts(size):
        path.write_bytes(content[:cut])
        faults.refused(path, "load_adapter")
    for cut in (0, 3, size // 3, size - 22, size - 1):
        path.write_bytes(content[:cut])
        faults.refused(path)


def flip(content: bytearray, random: Random, first: int, number: int) -> None:
    """Flip one bit among so many bytes from the first on."""
    place = first + random.randrange(number)
    content[place] ^= 1 << random.randrange(8)


@KINDS
def test_flipped_bits_are_refused_or_change_nothing(
    tmp_path: Path, good: Path, kind: str
) -> None:
    content = (good / f"good.{kind}").read_bytes()
    path = tmp_path / f"flipped.{kind}"
    random = Random(3)
    written = torch.load(good / "good.pt", weights_only=True)
    for _ in range(150):
        changed = bytearray(content)
        for _ in range(random.randint(1, 3)):
            flip(changed, random, 0, len(changed))
        path.write_bytes(changed)
        model = LitTiny()
        before = state(model)
        kinds_before = faults.kinds(model)
        try:
            ll.load_adapter(model, path)
            assert_state(model, written)
        except (ll.AdapterFileError, ll.AdapterMismatchError, ll.BaseMismatchError):
            assert_state(model, before)
            assert faults.kinds(model) == kinds_before


def places_of_records(path: Path) -> list[tuple[int, int]]:
    """Where the records of an archive begin, after padding, and their lengths."""
    content = path.read_bytes()
    found = []
    with zipfile.ZipFile(path) as archive:
        for each in archive.infolist():
            record = archive.read(each)
            padding = content.index(b"FB", each.header_offset)
            found.append((content.index(record, padding + 4), len(record)))
    return found


def test_one_bit_of_any_record_is_noticed_by_every_reader(
    tmp_path: Path, good: Path, capsys: Any
) -> None:
    """The optimizer's tensors are among these records, and nothing but the archive's own checksums covers them."""
    content = (good / "good.ckpt").read_bytes()
    path = tmp_path / "a.ckpt"
    random = Random(5)
    records = places_of_records(good / "good.ckpt")
    assert len(records) > 20
    for first, number in records:
        if number == 0:
            continue
        changed = bytearray(content)
        flip(changed, random, first, number)
        path.write_bytes(changed)
        with pytest.raises(ll.AdapterFileError, match="is damaged"):
            faults.WAYS["fit"](LitTiny(), path)
        with pytest.raises(ll.AdapterFileError, match="is damaged"):
            faults.WAYS["load_adapter"](LitTiny(), path)
        assert main(["inspect", str(path)]) == 1
        assert "is damaged" in capsys.readouterr().err


# Changed files


A = "q_proj.lora_A"
CHANGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a value": lambda checkpoint: checkpoint["state_dict"][A][0].add_(1),
    "no tensor": lambda checkpoint: checkpoint["state_dict"].update({A: "A"}),
    "dropped key": lambda checkpoint: checkpoint["state_dict"].pop(A),
    "no description": lambda checkpoint: checkpoint.update(lightning_lora=None),
    "list as state": lambda checkpoint: checkpoint.update(state_dict=[]),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_checkpoint_that_was_changed_is_refused(
    tmp_path: Path, good: Path, change: Any
) -> None:
    faults.refused(faults.edited(good / "good.ckpt", tmp_path / "changed.ckpt", change))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_that_diverged_are_refused(
    tmp_path: Path, good: Path, value: float
) -> None:
    def diverge(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][A][1, 3] = value
        set_checksum(checkpoint)

    faults.refused(faults.edited(good / "good.ckpt", tmp_path / "a.ckpt", diverge))
    path = Path(shutil.copy(good / "good.safetensors", tmp_path))
    rewrite(path, lambda _, tensors: tensors[A][1].fill_(value))
    faults.refused(path, "load_adapter")


# Versions


FIRST = {
    "r": 8,
    "alpha": 8,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "target_slices": None,
    "target_parameters": None,
    "exclude_modules": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "rank_pattern": None,
    "alpha_pattern": None,
    "bias": "none",
    "init": "kaiming",
    "use_rslora": False,
    "use_dora": False,
    "autocast_adapter_dtype": True,
}


def test_files_leave_out_defaults_which_no_version_of_the_format_may_change() -> None:
    known = ll.LoRAConfig().to_dict()
    assert FORMAT == 3
    assert known | FIRST == known
    assert ll.LoRAConfig().to_stored() == {}
    assert ll.LoRAConfig.from_dict({}) == ll.LoRAConfig()


def description_in(path: Path) -> dict[str, Any]:
    """What an adapter file says of its adapters."""
    with safe_open(path, "pt") as file:
        about: dict[str, Any] = json.loads(file.metadata()["lightning_lora"])
    return about


KNOWN_IN_0_2_0 = {
    "format": int,
    "config": dict,
    "base": list,
    "changed": list,
    "entries": int,
    "checksum": int,
    "layers": list,
    "random": list,
    "root": str,
    "saved": dict,
    "copies": list,  # of anything
}


def test_0_2_0_reads_files_of_this_version(tmp_path: Path) -> None:
    """It refuses names that it does not know.

    What is new stands where it takes anything.
    """
    saved(tmp_path / "a.safetensors", LitTiny())
    about = description_in(tmp_path / "a.safetensors")
    assert {name: type(value) for name, value in about.items()} == KNOWN_IN_0_2_0


def test_a_file_of_another_version_is_read_if_it_names_no_argument_that_is_unknown(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    model = saved(path, LitTiny(), r=2, alpha=4)
    assert description_in(path)["config"] == {"r": 2, "alpha": 4}
    restores(path, model)
    rewrite(path, lambda about, _: about["config"].update(use_new=False))
    with pytest.raises(
        ll.AdapterFileError, match=r"unknown arguments \['use_new'\]. A newer version"
    ):
        ll.load_adapter(LitTiny(), path)


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "layer": lambda layer: layer,
    "matrix": lambda layer: layer["parts"][0],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_a_later_version_may_add_what_changes_no_number(
    tmp_path: Path, part: Any
) -> None:
    def add_nothing(about: dict[str, Any], _: Any) -> None:
        part(about["layers"][0])["new"] = None
        about["base"][0]["dtypes"] = ["float32", "new_float"]

    def add_a_number(about: dict[str, Any], _: Any) -> None:
        part(about["layers"][0])["new"] = 1

    path = tmp_path / "a.safetensors"
    model = saved(path, LitTiny())
    restores(rewrite(path, add_nothing), model)
    rewrite(path, add_a_number)
    with pytest.raises(
        ll.AdapterFileError, match="says 'new' of a layer, as later versions do"
    ):
        ll.load_adapter(LitTiny(), path)


class _SharedAndTied(nn.Module):
    """A layer that is used under two names, and whose weight is a head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.head = nn.Linear(4, 4)
        self.head.weight = self.first.weight


def test_a_merged_model_is_described_as_before_its_merge(tmp_path: Path) -> None:
    model = _SharedAndTied()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["first"]))
    ll.save_adapter(model, tmp_path / "before.safetensors")
    with pytest.warns(ll.LoRAWarning, match="was tied"):
        ll.merge_adapters(model)
    ll.save_adapter(model, tmp_path / "after.safetensors")
    assert (tmp_path / "after.safetensors").read_bytes() == (
        tmp_path / "before.safetensors"
    ).read_bytes()

"""Damaged and forged files are refused."""

import json
import struct
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    LoRAConfig,
    LoRAError,
    load_adapter,
)
from lightning_lora.cli.main import main
from lightning_lora.model.view import View
from lightning_lora.storage.fingerprint import forms_of_base
from lightning_lora.storage.stored import FORMAT, StoredAdapters
from tests.support import faults
from tests.support.cases import held
from tests.support.models import LitTiny, same, state
from tests.support.storage import restores, rewrite, saved

pytestmark = faults.forks


# Damaged files


KINDS = pytest.mark.parametrize("kind", ["safetensors", "ckpt"])


@KINDS
def test_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path, good: Path, kind: str) -> None:
    content, path = (good / f"good.{kind}").read_bytes(), tmp_path / f"cut.{kind}"
    size = len(content)
    for cut in {*range(12), *range(0, size, size // 40), *range(size - 70, size, 7), size - 1}:
        path.write_bytes(content[:cut])
        faults.refused(path, "load_adapter")
    for cut in (0, 1, 3, size // 3, size - 22, size - 1):
        path.write_bytes(content[:cut])
        faults.refused(path)


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3)


def flip(content: bytes, flips: list[tuple[float, int]]) -> bytes:
    changed = bytearray(content)
    for place, bit in flips:
        changed[int(place * len(changed))] ^= 1 << bit
    return bytes(changed)


@KINDS
def test_flipped_bits_are_refused_or_change_nothing(tmp_path: Path, good: Path, kind: str) -> None:
    content, path = (good / f"good.{kind}").read_bytes(), tmp_path / f"flipped.{kind}"
    written = torch.load(good / "good.pt", weights_only=True)

    @settings(database=None, max_examples=150)
    @given(flips=FLIPS)
    def check(flips: list[tuple[float, int]]) -> None:
        path.write_bytes(flip(content, flips))
        model = LitTiny()
        before, kinds_before = state(model), faults.kinds(model)
        try:
            load_adapter(model, path)
            assert same(state(model), written)
        except (AdapterFileError, AdapterMismatchError, BaseMismatchError):
            assert same(state(model), before) and faults.kinds(model) == kinds_before

    check()


def test_flipped_bits_are_refused_or_the_resumed_run_is_the_same(tmp_path: Path, good: Path) -> None:
    def resumed(path: Path) -> dict[str, Tensor]:
        model = LitTiny()
        faults.with_trainer("fit", model, path)
        return state(model)

    content, path, through = (good / "good.ckpt").read_bytes(), tmp_path / "flipped.ckpt", resumed(good / "good.ckpt")

    @settings(database=None, max_examples=60)
    @given(flips=FLIPS)
    def check(flips: list[tuple[float, int]]) -> None:
        path.write_bytes(flip(content, flips))
        with suppress(AdapterFileError, AdapterMismatchError, BaseMismatchError):
            assert same(resumed(path), through)

    check()


def records_of(path: Path) -> dict[str, tuple[int, int]]:
    """The places of an archive's records in their file: the first byte of each, and the one after the last."""
    places = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for record in archive.infolist():
            file.seek(record.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            start = record.header_offset + 30 + name + extra
            places[record.filename] = (start, start + record.file_size)
    return places


def test_one_bit_of_any_record_is_noticed_by_every_reader(tmp_path: Path, good: Path, capsys: Any) -> None:
    """The optimizer's tensors are among these records, and nothing but the archive's own checksums covers them."""
    content, path = (good / "good.ckpt").read_bytes(), tmp_path / "a.ckpt"
    records, random = records_of(good / "good.ckpt"), Random(5)
    tensors = [name for name in records if "/data/" in name]
    assert len(tensors) > 20 and sum(end - start for start, end in records.values()) > len(content) / 2
    for start, end in records.values():
        for _ in range(3 if end > start else 0):
            changed = bytearray(content)
            changed[random.randrange(start, end)] ^= 1 << random.randrange(8)
            path.write_bytes(changed)
            for way in ("fit", "load_adapter"):
                with pytest.raises(AdapterFileError, match="is damaged"):
                    faults.WAYS[way](LitTiny(), path)
            assert main(["inspect", str(path)]) == 1 and "is damaged" in capsys.readouterr().err


# Forged files


def put(name: Any, make: Callable[[], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint["state_dict"].update({name: make()})


def say(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint["lightning_lora"].update(fields)


def target(modules: Any) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint["lightning_lora"]["config"].update(target_modules=modules)


A, ONE = "q_proj.lora_A", torch.ones(1, 1)
FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "dropped key": lambda checkpoint: checkpoint["state_dict"].pop(A),
    "renamed key": lambda checkpoint: checkpoint["state_dict"].update(a=checkpoint["state_dict"].pop(A)),
    "number as key": put(3, lambda: ONE),
    "None as key": put(None, lambda: ONE),
    "bytes as key": put(b"a", lambda: ONE),
    "pair as key": put((A, 1), lambda: ONE),
    "text": put(A, lambda: "A"),
    "bool": put(A, lambda: torch.ones(2, 8, dtype=torch.bool)),
    "complex": put(A, lambda: torch.ones(2, 8, dtype=torch.complex64)),
    "quantised": put(A, lambda: torch.quantize_per_tensor(torch.ones(2, 8), 0.1, 0, torch.quint8)),
    "meta": put(A, lambda: torch.ones(2, 8, device="meta")),
    "sparse": put(A, lambda: torch.ones(2, 8).to_sparse()),
    "compressed rows": put(A, lambda: torch.ones(2, 8).to_sparse_csr()),
    "nested": put(A, lambda: torch.nested.nested_tensor([torch.ones(8), torch.ones(8)])),
    "gigabytes expanded from one number": put(A, lambda: ONE.expand(1 << 16, 1 << 14)),
    "more than any memory expanded from one number": put(A, lambda: ONE.expand(1 << 30, 1 << 30)),
    "sparse and giant": put(A, lambda: torch.sparse_coo_tensor(torch.zeros(2, 1), torch.ones(1), (1 << 30, 1 << 30))),
    "giant under another name": put("a", lambda: ONE.expand(1 << 16, 1 << 14)),
    "endless base": say(base=faults.endless()),
    "base that explodes": say(base=faults.laughs()),
    "target_modules that explode": target(faults.laughs()),
    "expression of a thousand parts": target("(" * 500 + ")" * 500),
    "no description": lambda checkpoint: checkpoint.update(lightning_lora=None),
    "tensor as description": lambda checkpoint: checkpoint.update(lightning_lora=torch.ones(2)),
    "list as state": lambda checkpoint: checkpoint.update(state_dict=[]),
}


@pytest.mark.processes
@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_forged_checkpoint_is_refused_at_no_cost(tmp_path: Path, good: Path, change: Any) -> None:
    path = faults.edited(good / "good.ckpt", tmp_path / "forged.ckpt", change)
    faults.frugal(partial(faults.refused, path))


JUNK: list[Any] = [
    None, True, -1, 2, 10**400, 0.5, float("nan"), "x", "(", "", b"x", [], [1], [[]], [None], {}, {"a": 1},
    {1: 2, "a": 3}, {1}, torch.ones(2), [torch.ones(2)], faults.endless(), [{"layout": 1, "dtypes": 2, "digests": 3}],
    [{"layout": torch.ones(2), "dtypes": [], "digests": [torch.ones(2)]}],
]  # fmt: skip


@pytest.mark.processes
def test_description_of_wrong_types_is_refused(tmp_path: Path, good: Path) -> None:
    def work() -> None:
        said = torch.load(good / "good.ckpt", weights_only=True)["lightning_lora"]
        config, path = said["config"], tmp_path / "a.ckpt"
        places = [(said, field) for field in (*said, "more")] + [(config, field) for field in config]
        for (whole, field), junk in product(places, JUNK):
            if field in whole and repr(junk) == repr(whole[field]):
                continue  # what it said anyway
            change = say(**{field: junk}) if whole is said else say(config={**config, field: junk})
            faults.edited(good / "good.ckpt", path, change)
            with faults.unchanged(model := LitTiny()), pytest.raises(LoRAError):
                load_adapter(model, path)

    faults.frugal(work)


def about(config: str = "{}", base: str = "[]", checksum: str = "1") -> str:
    return f'{{"format": {FORMAT}, "config": {config}, "checksum": {checksum}, "base": {base}}}'


METADATA: dict[str, str] = {
    "number": "3",
    "list": "[]",
    "text": '"format"',
    "deep": "[" * 100_000,
    "deep base": about(base="[" * 900 + "]" * 900),
    "huge alpha": about(f'{{"alpha": {"9" * 4000}}}'),
    "huge rank": about(f'{{"r": {"9" * 4000}}}'),
    "hugest rank": about(f'{{"r": {"9" * 100_000}}}'),
    "infinite checksum": about(checksum="1e999"),
    "half a letter": about(base='"\\ud800"'),
    "wrong types": about("[]", "{}", "[]"),
}


@pytest.mark.processes
@pytest.mark.parametrize("text", METADATA.values(), ids=METADATA)
def test_metadata_of_wrong_types_is_refused(tmp_path: Path, good: Path, text: str) -> None:
    save_file(load_file(good / "good.safetensors"), tmp_path / "a.safetensors", {"lightning_lora": text})
    faults.frugal(partial(faults.refused, tmp_path / "a.safetensors"))


DIVERGED = {
    "nan": (A, torch.full((2, 8), float("nan"))),
    "inf": ("v_proj.lora_B", torch.full((8, 2), float("inf"))),
    "-inf at one place": (A, torch.ones(2, 8).index_fill(1, torch.tensor([7]), -float("inf"))),
    "too large for the model": (A, torch.full((2, 8), 1e300, dtype=torch.float64)),
}


@pytest.mark.parametrize(("name", "value"), DIVERGED.values(), ids=DIVERGED)
def test_adapters_that_diverged_are_refused(tmp_path: Path, good: Path, name: str, value: Tensor) -> None:
    """Though their file is whole."""

    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][name] = value
        stored = StoredAdapters.from_view(view := View(faults.adapted()), held(checkpoint), forms_of_base(view))
        checkpoint["lightning_lora"] = stored.description()

    faults.edited(good / "good.ckpt", tmp_path / "a.ckpt", change)
    faults.refused(tmp_path / "a.ckpt")
    written = torch.load(tmp_path / "a.ckpt", weights_only=True)
    said = {"lightning_lora": json.dumps(written["lightning_lora"])}
    save_file(held(written), tmp_path / "a.safetensors", said)
    faults.refused(tmp_path / "a.safetensors", "load_adapter")


MANY = 300_000


@pytest.mark.processes
def test_very_many_keys_are_refused_in_bounded_time_and_memory(tmp_path: Path, good: Path) -> None:
    with safe_open(good / "good.safetensors", "pt") as opened:
        entries = ['"__metadata__":' + json.dumps(opened.metadata())]
    entries += [f'"k{i}":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}' for i in range(MANY)]
    header = ("{" + ",".join(entries) + "}").encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * MANY))
    more = {f"k{i}": ONE for i in range(MANY)}
    faults.edited(good / "good.ckpt", tmp_path / "a.ckpt", lambda whole: whole["state_dict"].update(more))
    for name, way in (("a.safetensors", "load_adapter"), ("a.ckpt", "load_adapter"), ("a.ckpt", "test")):
        faults.frugal(partial(faults.refused, tmp_path / name, way, builds=[LitTiny]), most=1 << 29)


# Versions


FIRST = {
    "r": 8, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear", "target_slices": None,
    "target_parameters": None, "exclude_modules": None, "modules_to_save": None, "trainable_token_indices": None,
    "rank_pattern": None, "alpha_pattern": None, "bias": "none", "init": "kaiming", "use_rslora": False,
    "use_dora": False, "autocast_adapter_dtype": True,
}  # fmt: skip


def test_files_leave_out_defaults_which_no_version_of_the_format_may_change() -> None:
    known = LoRAConfig().to_dict()
    assert FORMAT == 3 and {name: known[name] for name in FIRST} == FIRST
    assert LoRAConfig().to_stored() == {} and LoRAConfig.from_dict({}) == LoRAConfig()


def test_a_file_of_another_version_is_read_if_it_names_no_argument_that_is_unknown(tmp_path: Path) -> None:
    model = saved(path := tmp_path / "a.safetensors", LitTiny(), r=2, alpha=4)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["lightning_lora"])["config"] == {"r": 2, "alpha": 4}
    restores(path, model)
    rewrite(path, lambda about, _: about["config"].update({**FIRST, "r": 2, "alpha": 4}))  # an earlier version's
    restores(path, model)
    rewrite(path, lambda about, _: about["config"].update(use_new=False))
    with pytest.raises(AdapterFileError, match=r"unknown arguments \['use_new'\]. A newer version"):
        load_adapter(LitTiny(), path)

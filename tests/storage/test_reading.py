"""Files are read without harm."""

import os
import pickle
import struct
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lora import AdapterFileError, load_adapter
from tests.support.faults import WAYS, Runs, forks, frugal, put_pickle, refused, unchanged
from tests.support.models import LitTiny, data, lora, trainer
from tests.support.storage import fitted

pytestmark = forks


@pytest.mark.processes
def test_what_is_no_file_of_adapters_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    for size in (0, 1, 7, 1 << 31, 1 << 62, (1 << 64) - 1):
        (tmp_path / f"header of {size}.safetensors").write_bytes(struct.pack("<Q", size) + b"{}" + bytes(90))
    for i, content in enumerate((b"", b"P", b"PK", b"PK\5\6" + bytes(18), bytes(99))):
        (tmp_path / f"{i}.ckpt").write_bytes(content)
    for path in [*tmp_path.iterdir(), tmp_path / "none.ckpt", tmp_path / ("n" * 300), tmp_path / "0.ckpt" / "a"]:
        frugal(partial(refused, path))


@pytest.mark.parametrize("key", ["state_dict", "lightning_lora", "hyper_parameters", "callbacks", "loops", "more"])
def test_code_in_a_file_does_not_run(tmp_path: Path, good: Path, key: str) -> None:
    mark, checkpoint = tmp_path / "ran", torch.load(good / "good.ckpt", weights_only=True)
    checkpoint[key] = Runs(mark)
    torch.save(checkpoint, tmp_path / "zip.ckpt")
    torch.save(checkpoint, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(checkpoint))
    with zipfile.ZipFile(tmp_path / "script.ckpt", "w") as script:
        for name in ("data.pkl", "constants.pkl"):
            script.writestr(f"a/{name}", pickle.dumps(checkpoint))
    for name in ("zip", "legacy", "bare", "script"):
        reads = name == "zip" and key not in ("state_dict", "lightning_lora")  # what is beside adapters is left out
        refused(path := tmp_path / f"{name}.ckpt", *(set(WAYS) - {"load_adapter"} if reads else WAYS))
        if reads:
            load_adapter(LitTiny(), path)
        assert not mark.exists()


@pytest.mark.processes
@pytest.mark.parametrize("where", ["data.pkl", "data/0"])
def test_compressed_bomb_is_refused_before_it_bursts(tmp_path: Path, good: Path, where: str) -> None:
    with (
        zipfile.ZipFile(good / "good.ckpt") as whole,
        zipfile.ZipFile(path := tmp_path / "bomb.ckpt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb,
    ):
        for name in whole.namelist():
            with bomb.open(name, "w", force_zip64=True) as part:
                part.write(whole.read(name))
                for _ in range(256 if name.endswith(where) else 0):
                    part.write(bytes(1 << 20))
    assert path.stat().st_size < 4 << 20
    frugal(partial(refused, path), most=1 << 27)


SIZED = [b"\x80\x02c" + maker + b"\nJ\0\0\0\x70\x85R." for maker in (b"builtins\nbytearray", b"torch\nFloatTensor")]
BOMBS = {"bytearray": SIZED[0], "tensor": SIZED[1], "disguised": b"PK\n" + SIZED[0]}


@pytest.mark.parametrize("bomb", SIZED)
def test_pickle_that_only_names_a_size_is_refused(tmp_path: Path, bomb: bytes) -> None:
    torch.save({}, path := tmp_path / "a.ckpt")
    put_pickle(bomb, path)
    with pytest.raises(AdapterFileError, match=r"is damaged: .*data.pkl"):
        load_adapter(LitTiny(), path)


@pytest.mark.processes
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("tail", [b"", b"PK\5\6" + bytes(18)], ids=["bare", "with the end of an archive"])
def test_bare_pickle_is_refused_before_it_is_unpickled(tmp_path: Path, bomb: bytes, tail: bytes) -> None:
    (tmp_path / "a.ckpt").write_bytes(bomb + tail)
    frugal(partial(refused, tmp_path / "a.ckpt"), most=1 << 28)


def test_file_in_the_old_format_of_torch_is_read_if_it_is_trusted(tmp_path: Path) -> None:
    fitted(path := tmp_path / "full.ckpt", LitTiny(), plain=True)
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterFileError, match=r"write it again: torch.save\(torch.load"):
        trainer(tmp_path, [lora()], max_epochs=1).fit(LitTiny(), data(), ckpt_path=path)
    torch.save(torch.load(path, weights_only=False), path)
    trainer(tmp_path, [lora()], max_epochs=1).fit(LitTiny(), data(), ckpt_path=path)


def test_record_that_claims_to_be_a_folder_is_refused(tmp_path: Path) -> None:
    """Torch reads nothing of it, and gives memory as it happens to be."""
    fitted(path := tmp_path / "full.ckpt", LitTiny(), plain=True)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names, start = [record.filename for record in archive.infolist()], archive.start_dir
    for name in names:
        changed = bytearray(whole)
        changed[whole.index(name.encode(), start) - 8] ^= 0x10
        path.write_bytes(changed)
        model = LitTiny()
        with unchanged(model), pytest.raises(AdapterFileError, match="is damaged"):
            trainer(tmp_path, [lora()]).fit(model, data(), ckpt_path=path)


def test_honest_tensors_with_attributes_are_no_damage(tmp_path: Path) -> None:
    class Keeps(L.Callback):
        def state_dict(self) -> dict[str, Any]:
            tagged = torch.ones(2)
            tagged.tag = "a"  # type: ignore[attr-defined]
            return {"tagged": tagged}

    saves = ModelCheckpoint(tmp_path, "a")
    trainer(tmp_path, [lora(), Keeps(), saves], max_epochs=1).fit(LitTiny(), data())
    trainer(tmp_path, [lora(), Keeps()]).fit(LitTiny(), data(), ckpt_path=tmp_path / "a.ckpt")

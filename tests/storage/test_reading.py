"""Files are read without harm."""

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import AdapterFileError, load_adapter
from tests.support.faults import Runs, forks, refused
from tests.support.models import LitTiny, data, lora, trainer
from tests.support.storage import fitted

pytestmark = forks


def test_what_is_no_file_of_adapters_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    for size in (0, 7, (1 << 64) - 1):
        (tmp_path / f"header of {size}.safetensors").write_bytes(struct.pack("<Q", size) + b"{}" + bytes(90))
    for i, content in enumerate((b"", b"PK", bytes(99))):
        (tmp_path / f"{i}.ckpt").write_bytes(content)
    for path in [*tmp_path.iterdir(), tmp_path / "none.ckpt"]:
        refused(path, builds=[LitTiny])


@pytest.mark.parametrize("key", ["state_dict", "hyper_parameters"])
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
        refused(tmp_path / f"{name}.ckpt", "load_from_checkpoint", "fit", "test", builds=[LitTiny])
        if key == "hyper_parameters" and name == "zip":  # what is beside adapters is left out
            load_adapter(LitTiny(), tmp_path / "zip.ckpt")
        else:
            refused(tmp_path / f"{name}.ckpt", "load_adapter")
        assert not mark.exists()


def test_file_in_the_old_format_of_torch_is_read_if_it_is_trusted(tmp_path: Path) -> None:
    fitted(path := tmp_path / "full.ckpt", LitTiny(), plain=True)
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterFileError, match=r"write it again: torch.save\(torch.load"):
        trainer(tmp_path, [lora()], max_epochs=1).fit(LitTiny(), data(), ckpt_path=path)
    torch.save(torch.load(path, weights_only=False), path)
    trainer(tmp_path, [lora()], max_epochs=1).fit(LitTiny(), data(), ckpt_path=path)


def test_record_that_claims_to_be_a_folder_is_refused(tmp_path: Path, good: Path) -> None:
    """Torch reads nothing of it, and gives memory as it happens to be."""
    whole, path = (good / "good.ckpt").read_bytes(), tmp_path / "a.ckpt"
    with zipfile.ZipFile(good / "good.ckpt") as archive:
        names, start = archive.namelist(), archive.start_dir
    for name in names:
        changed = bytearray(whole)
        changed[whole.index(name.encode(), start) - 8] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(AdapterFileError, match="is damaged"):
            load_adapter(LitTiny(), path)


ODD: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": Tensor.to_sparse,
    "8 bits": lambda value: value.to(torch.float8_e4m3fn),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_odd_tensors_of_other_libraries_are_refused(tmp_path: Path, make: Callable[[Tensor], Tensor]) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    a, b = torch.ones(2, 8), make(torch.ones(8, 2))
    peft = {"base_model.model.q_proj.lora_A.weight": a, "base_model.model.q_proj.lora_B.weight": b}
    loralib: dict[str, Any] = {"q_proj.lora_A": a, "q_proj.lora_B": b}
    for held, options in ((peft, {}), (loralib, {"alpha": 2}), ({"model_state_dict": loralib}, {"alpha": 2})):
        torch.save(held, tmp_path / "a.bin")
        with pytest.raises(AdapterFileError, match=r"lora_B.* no plain tensors"):
            load_adapter(LitTiny(), tmp_path / "a.bin", **options)

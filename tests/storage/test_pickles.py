"""Files are read without harm, and adapters beside objects of classes without these classes."""

import contextlib
import enum
import os
import pickle
import struct
import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterFileError,
    ConfigError,
    load_adapter,
    load_from_checkpoint,
    merge_adapters,
)
from lightning_lora.cli.main import main
from lightning_lora.storage.disk import load_plain
from tests.support.compared import assert_same_state, assert_same_tensors, assert_state
from tests.support.faults import Runs, forks, put_pickle, refused, unchanged
from tests.support.models import LitTiny, best, data, lora, state, trainer
from tests.support.storage import Holds, fitted, restores

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
    (tmp_path / "zero.ckpt" / "checkpoint").mkdir(parents=True)
    with pytest.raises(AdapterFileError, match=r"a folder of DeepSpeed\. Make it one file"):
        load_adapter(LitTiny(), tmp_path / "zero.ckpt")


@pytest.mark.parametrize("key", ["state_dict", "hyper_parameters"])
def test_code_in_a_file_does_not_run(tmp_path: Path, good: Path, key: str) -> None:
    mark = tmp_path / "ran"
    checkpoint = torch.load(good / "good.ckpt", weights_only=True)
    checkpoint[key] = Runs(mark)
    torch.save(checkpoint, tmp_path / "zip.ckpt")
    torch.save(checkpoint, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.ckpt").write_bytes(pickle.dumps(checkpoint))
    with zipfile.ZipFile(tmp_path / "script.ckpt", "w") as script:
        for name in ("data.pkl", "constants.pkl"):
            script.writestr(f"a/{name}", pickle.dumps(checkpoint))
    for name in ("zip", "legacy", "bare", "script"):
        refused(
            tmp_path / f"{name}.ckpt",
            "load_from_checkpoint",
            "fit",
            "test",
            builds=[LitTiny],
        )
        if key == "hyper_parameters" and name == "zip":  # what is beside adapters is left out
            load_adapter(LitTiny(), tmp_path / "zip.ckpt")
        else:
            refused(tmp_path / f"{name}.ckpt", "load_adapter")
        assert not mark.exists()


def test_a_base_of_an_old_lightning_in_the_old_format_of_torch_is_read(tmp_path: Path) -> None:
    path = tmp_path / "full.ckpt"
    fitted(path, LitTiny(), plain=True)
    checkpoint = torch.load(path, weights_only=True) | {"pytorch-lightning_version": "0.9"}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    t = trainer(tmp_path, [lora()], max_epochs=1)
    t.fit(LitTiny(), data(), ckpt_path=path)
    assert t.global_step == 4


# Beside objects of classes


class Mode(enum.Enum):
    FAST = 1


@dataclass
class Settings:
    rate: float
    mode: Mode


class Outer:
    class Inner:
        pass


HELD: dict[str, Any] = {
    "class": nn.Linear,
    "partial": partial(torch.optim.AdamW, lr=0.1),
    "dataclass": Settings(0.1, Mode.FAST),
    "class inside": Outer.Inner(),
    "network": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    "array": torch.arange(3).numpy(),
    "nested": [{1, 2}, (Path("b"), 1 << 200)],
    Mode.FAST: b"x",  # type: ignore[dict-item]
}


def test_adapters_beside_hyperparameters_of_any_kind_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fitted(path, model := Holds(given=HELD))
    restores(path, model)


def test_a_base_beside_objects_of_classes_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ckpt"
    base = tmp_path / "base.ckpt"
    fitted(path, Holds(given=Settings))
    torch.save(
        {"state_dict": LitTiny().state_dict(), "hyper_parameters": {"given": Settings}},
        base,
    )
    assert main(["merge", str(base), str(path), str(tmp_path / "merged.ckpt")]) == 1
    assert "would be lost" in capsys.readouterr().err
    assert not (tmp_path / "merged.ckpt").exists()
    assert main(["merge", str(base), str(path), str(tmp_path / "merged.safetensors")]) == 0
    model = LitTiny()
    load_adapter(model, path)
    merge_adapters(model)
    merged = load_file(tmp_path / "merged.safetensors")
    assert_state(model, {name: merged[name] for name in state(model)})


def test_the_best_file_of_a_run_is_merged(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = Holds(given=Settings)
    judge = best(tmp_path, filename="a")
    trainer(tmp_path, [lora(merge="best"), judge], max_epochs=2).fit(model, data(), data())
    again = LitTiny()
    load_adapter(again, judge.best_model_path)
    x = torch.arange(5)
    assert torch.allclose(model(x), again(x), atol=1e-6)
    assert not [w for w in recwarn if "best" in str(w.message)]


def test_what_needs_the_classes_names_them_and_the_argument(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    fitted(path, model := Holds(given=Settings))
    with pytest.raises(AdapterFileError, match=r"such as 'tests.*.Settings': .*load_from_checkpoint"):
        load_from_checkpoint(Holds, path)
    assert_same_state(load_from_checkpoint(Holds, path, weights_only=False), model)
    with pytest.raises(ConfigError, match="Pass the class Holds"):
        load_from_checkpoint(model, path)


@pytest.mark.parametrize("where", ["state_dict", "lightning_lora"])
def test_adapters_must_be_plain(tmp_path: Path, good: Path, where: str) -> None:
    checkpoint = torch.load(good / "good.ckpt", weights_only=True)
    checkpoint[where]["more"] = [{"a": (Settings,)}]
    torch.save(checkpoint, path := tmp_path / "a.ckpt")
    with (
        unchanged(model := LitTiny()),
        pytest.raises(AdapterFileError, match=r"a.ckpt holds '.*Settings' among its"),
    ):
        load_adapter(model, path)


# Nothing runs


def pickled_in(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def attacks(mark: Path) -> dict[str, bytes]:
    """Operations of a pickle that would make a folder, import a module, or change torch."""
    text = b"X" + len(str(mark)).to_bytes(4, "little") + str(mark).encode()
    mkdir = b"cposix\nmkdir\n"
    return {
        "a call": mkdir + b"(" + text + b"tR",
        "a call of eval": b"cbuiltins\neval\n(X\x12\0\0\0__import__('this')tR",
        "a call of what a call returns": mkdir + b"(" + text + b"tR(" + text + b"tR",
        "a name from the stack": b"\x8c\x04this\x8c\x01d\x93",
        "an instance": b"(" + text + b"iposix\nmkdir\n",
        "an object": b"(" + mkdir + text + b"o",
        "a new object": mkdir + b"(" + text + b"t\x81",
        "a state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\0\0\0__defaults__)sb",
        "a state of a class of torch": b"ctorch\nTensor\nN}X\x03\0\0\0add" + mkdir + b"s\x86b",
        "registered code": b"\x82\x01",
        "an object elsewhere": mkdir + b"Q",
    }


@pytest.mark.parametrize("attack", attacks(Path()))
def test_nothing_in_a_file_runs_or_is_imported(tmp_path: Path, good: Path, attack: str) -> None:
    path = tmp_path / "a.ckpt"
    mark = tmp_path / "ran"
    path.write_bytes((good / "good.ckpt").read_bytes())
    put_pickle(pickled_in(path)[:-1] + b"X\4\0\0\0more" + attacks(mark)[attack] + b"s.", path)
    tensor = dict(vars(Tensor))
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    model = LitTiny()
    with contextlib.suppress(AdapterFileError):  # of a pickle that no program writes
        load_adapter(model, path)
        assert_state(model, torch.load(good / "good.pt", weights_only=True))
    assert not mark.exists()
    assert "this" not in sys.modules
    assert dict(vars(Tensor)) == tensor
    assert torch._utils._rebuild_tensor_v2.__defaults__ is defaults


def test_tensors_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    whole = {
        "half": values.bfloat16(),
        "rows": values[1, :, ::2].t(),
        "empty": torch.empty(0, 3),
    }
    torch.save([whole | {"parameter": nn.Parameter(values)}, Mode.FAST], path := tmp_path / "a.pt")
    (read, _), (expected, _) = load_plain(path), torch.load(path, weights_only=False)
    assert_same_tensors(read, expected)
    assert all(read[name].stride() == expected[name].stride() for name in read)

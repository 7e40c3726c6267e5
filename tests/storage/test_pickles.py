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
from lightning_lora.storage.on_disk.plain_pickles import load_plain
from tests.support.compared import assert_same_state, assert_same_tensors, assert_state
from tests.support.faults import Runs, forks, put_pickle, refused, unchanged
from tests.support.models import LitTiny, best, data, lora, state, trainer
from tests.support.parameters import chosen
from tests.support.storage import Holds, fitted, restores

pytestmark = forks


def with_header_of(size: int) -> bytes:
    """A file that says that its header has this size."""
    return struct.pack("<Q", size) + b"{}" + bytes(90)


NO_FILES = {
    "header of 0.safetensors": with_header_of(0),
    "header of 7.safetensors": with_header_of(7),
    "endless header.safetensors": with_header_of((1 << 64) - 1),
    "empty.ckpt": b"",
    "cut.ckpt": b"PK",
    "zeros.ckpt": bytes(99),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_file_of_adapters_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(NO_FILES[name])
    refused(tmp_path / name, builds=[LitTiny])


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    refused(tmp_path / "pipe.ckpt", builds=[LitTiny])
    refused(tmp_path / "folder.ckpt", builds=[LitTiny])
    refused(tmp_path / "none.ckpt", builds=[LitTiny])
    (tmp_path / "zero.ckpt" / "checkpoint").mkdir(parents=True)
    with pytest.raises(
        AdapterFileError, match=r"a folder of DeepSpeed\. Make it one file"
    ):
        load_adapter(LitTiny(), tmp_path / "zero.ckpt")


def write_zip(checkpoint: Any, path: Path) -> None:
    torch.save(checkpoint, path)


def write_legacy(checkpoint: Any, path: Path) -> None:
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)


def write_bare(checkpoint: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(checkpoint))


def write_script(checkpoint: Any, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as script:
        script.writestr("a/data.pkl", pickle.dumps(checkpoint))
        script.writestr("a/constants.pkl", pickle.dumps(checkpoint))


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_bare, write_script])
@pytest.mark.parametrize("key", ["state_dict", "hyper_parameters"])
def test_code_in_a_file_does_not_run(
    tmp_path: Path, good: Path, key: str, write: Any
) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "a.ckpt"
    checkpoint = torch.load(good / "good.ckpt", weights_only=True)
    checkpoint[key] = Runs(mark)
    write(checkpoint, path)
    refused(path, "load_from_checkpoint", "fit", "test", builds=[LitTiny])
    # what is beside adapters is left out
    if key == "hyper_parameters" and write is write_zip:
        load_adapter(LitTiny(), path)
    else:
        refused(path, "load_adapter")
    assert not mark.exists()


def test_a_base_of_an_old_lightning_in_the_old_format_of_torch_is_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "full.ckpt"
    fitted(path, LitTiny(), plain=True)
    checkpoint = torch.load(path, weights_only=True) | {
        "pytorch-lightning_version": "0.9"
    }
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
    model = Holds(given=HELD)
    fitted(path, model)
    restores(path, model)


def test_a_base_beside_objects_of_classes_is_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.ckpt"
    base = tmp_path / "base.ckpt"
    fitted(path, Holds(given=Settings))
    about = {
        "state_dict": LitTiny().state_dict(),
        "hyper_parameters": {"given": Settings},
    }
    torch.save(about, base)
    assert main(["merge", str(base), str(path), str(tmp_path / "merged.ckpt")]) == 1
    assert "would be lost" in capsys.readouterr().err
    assert not (tmp_path / "merged.ckpt").exists()
    assert (
        main(["merge", str(base), str(path), str(tmp_path / "merged.safetensors")]) == 0
    )
    model = LitTiny()
    load_adapter(model, path)
    merge_adapters(model)
    merged = load_file(tmp_path / "merged.safetensors")
    assert_state(model, chosen(merged, state(model)))


def test_the_best_file_of_a_run_is_merged(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = Holds(given=Settings)
    judge = best(tmp_path, filename="a")
    trainer(tmp_path, [lora(merge="best"), judge], max_epochs=2).fit(
        model, data(), data()
    )
    again = LitTiny()
    load_adapter(again, judge.best_model_path)
    x = torch.arange(5)
    assert torch.allclose(model(x), again(x), atol=1e-6)
    assert not [w for w in recwarn if "best" in str(w.message)]


def test_what_needs_the_classes_names_them_and_the_argument(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    model = Holds(given=Settings)
    fitted(path, model)
    with pytest.raises(
        AdapterFileError, match=r"such as 'tests.*.Settings': .*load_from_checkpoint"
    ):
        load_from_checkpoint(Holds, path)
    assert_same_state(load_from_checkpoint(Holds, path, weights_only=False), model)
    with pytest.raises(ConfigError, match="Pass the class Holds"):
        load_from_checkpoint(model, path)


@pytest.mark.parametrize("where", ["state_dict", "lightning_lora"])
def test_adapters_must_be_plain(tmp_path: Path, good: Path, where: str) -> None:
    path = tmp_path / "a.ckpt"
    checkpoint = torch.load(good / "good.ckpt", weights_only=True)
    checkpoint[where]["more"] = [{"a": (Settings,)}]
    torch.save(checkpoint, path)
    model = LitTiny()
    with (
        unchanged(model),
        pytest.raises(AdapterFileError, match=r"a.ckpt holds '.*Settings' among its"),
    ):
        load_adapter(model, path)


# Nothing runs


def pickled_in(path: Path) -> bytes:
    """The one pickle in an archive of torch."""
    with zipfile.ZipFile(path) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return archive.read(name)


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
        "a state of a class of torch": b"ctorch\nTensor\nN}X\x03\0\0\0add"
        + mkdir
        + b"s\x86b",
        "registered code": b"\x82\x01",
        "an object elsewhere": mkdir + b"Q",
    }


@pytest.mark.parametrize("attack", attacks(Path()))
def test_nothing_in_a_file_runs_or_is_imported(
    tmp_path: Path, good: Path, attack: str
) -> None:
    path = tmp_path / "a.ckpt"
    mark = tmp_path / "ran"
    path.write_bytes((good / "good.ckpt").read_bytes())
    put_pickle(
        pickled_in(path)[:-1] + b"X\4\0\0\0more" + attacks(mark)[attack] + b"s.", path
    )
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
    path = tmp_path / "a.pt"
    values = torch.arange(24.0).view(2, 3, 4)
    tensors = {
        "half": values.bfloat16(),
        "rows": values[1, :, ::2].t(),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(values),
    }
    torch.save([tensors, Mode.FAST], path)
    read, _ = load_plain(path)
    expected, _ = torch.load(path, weights_only=False)
    assert_same_tensors(read, expected)
    for name, value in expected.items():
        assert read[name].stride() == value.stride()

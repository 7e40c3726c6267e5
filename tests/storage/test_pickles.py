"""Adapters are read from files that hold objects of classes, without these classes."""

import contextlib
import enum
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import AdapterFileError, load_adapter, load_from_checkpoint, merge_adapters
from lightning_lora.cli.main import main
from lightning_lora.storage.disk import load_plain
from tests.support.faults import frugal, laughs, put_pickle, unchanged
from tests.support.models import LitTiny, best, data, lora, same, state, trainer
from tests.support.storage import fitted, restores


class Mode(enum.Enum):
    FAST = 1


@dataclass
class Settings:
    rate: float
    mode: Mode


class Outer:
    class Inner:
        pass


class Holds(LitTiny):
    """A module with what frameworks put into hyperparameters."""

    def __init__(self, **extra: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


HELD: dict[str, Any] = {
    "class": nn.Linear,
    "function": torch.relu,
    "partial": partial(torch.optim.AdamW, lr=0.1),
    "enum": Mode.FAST,
    "dataclass": Settings(0.1, Mode.FAST),
    "path": Path("a"),
    "class inside": Outer.Inner(),
    "set": {1, 2},
    "loss": nn.CrossEntropyLoss(torch.ones(4)),
    "network": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    "array": torch.arange(3).numpy(),
    "many": {"a": [Mode.FAST, (Path("b"), 1 << 200)], Mode.FAST: b"x"},
}


nets = pytest.mark.filterwarnings("ignore:.*is an instance of `nn.Module`:UserWarning")


@nets
@pytest.mark.parametrize("kind", HELD)
def test_adapters_beside_a_hyperparameter_of_any_kind_are_read(tmp_path: Path, kind: str) -> None:
    fitted(path := tmp_path / "a.ckpt", model := Holds(given=HELD[kind]))
    restores(path, model, Holds(given=HELD[kind]))


def test_the_classes_need_not_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_up.py").write_text("class Plan:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    plan = __import__("made_up").Plan()
    fitted(path := tmp_path / "a.ckpt", model := Holds(plan=plan))
    (tmp_path / "made_up.py").unlink()
    del sys.modules["made_up"]
    restores(path, model)
    assert "made_up" not in sys.modules


def test_a_base_beside_objects_of_classes_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, base = tmp_path / "a.ckpt", tmp_path / "base.ckpt"
    fitted(path, Holds(given=Settings))
    torch.save({"state_dict": LitTiny().state_dict(), "hyper_parameters": {"given": Settings}}, base)
    assert main(["merge", str(base), str(path), str(tmp_path / "merged.ckpt")]) == 1
    assert "would be lost" in capsys.readouterr().err and not (tmp_path / "merged.ckpt").exists()
    assert main(["merge", str(base), str(path), str(tmp_path / "merged.safetensors")]) == 0
    load_adapter(model := LitTiny(), path)
    merge_adapters(model)
    merged = load_file(tmp_path / "merged.safetensors")
    assert same({name: merged[name] for name in state(model)}, state(model))


def test_the_best_file_of_a_run_is_merged(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, judge = Holds(given=Settings), best(tmp_path, filename="a")
    trainer(tmp_path, [lora(merge="best"), judge], max_epochs=2).fit(model, data(), data())
    load_adapter(again := LitTiny(), judge.best_model_path)
    x = torch.arange(5)
    assert torch.allclose(model(x), again(x), atol=1e-6) and not [w for w in recwarn if "best" in str(w.message)]


# What needs the classes says so


def test_what_needs_the_classes_names_them_and_the_argument(tmp_path: Path) -> None:
    fitted(path := tmp_path / "a.ckpt", model := Holds(given=Settings))
    with pytest.raises(AdapterFileError, match=r"such as 'tests.*.Settings': .*load_from_checkpoint"):
        load_from_checkpoint(Holds, path)
    assert same(state(load_from_checkpoint(Holds, path, weights_only=False)), state(model))
    with pytest.raises(AdapterFileError, match=r"such as 'tests.*.Settings': .*trainer.fit\(.*weights_only=False"):
        trainer(tmp_path, [lora()]).fit(Holds(given=Settings), data(), ckpt_path=path)


@pytest.mark.parametrize("where", ["state_dict", "lightning_lora"])
@pytest.mark.parametrize("deep", [False, True])
def test_adapters_must_be_plain(tmp_path: Path, good: Path, where: str, deep: bool) -> None:
    checkpoint = torch.load(good / "good.ckpt", weights_only=True)
    checkpoint[where]["more"] = [{"a": (Settings,)}] if deep else Settings
    torch.save(checkpoint, path := tmp_path / "a.ckpt")
    with unchanged(model := LitTiny()), pytest.raises(AdapterFileError, match=r"a.ckpt holds '.*Settings' among its"):
        load_adapter(model, path)


# Nothing runs


def pickled_in(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def attacks(mark: Path) -> dict[str, bytes]:
    """Operations of a pickle that would make a folder, import a module, or change torch."""
    text = b"X" + len(str(mark)).to_bytes(4, "little") + str(mark).encode()
    mkdir, plan = b"cposix\nmkdir\n", b"cthis\nPlan\n)\x81"
    return {
        "a call": mkdir + b"(" + text + b"tR",
        "a call of eval": b"cbuiltins\neval\n(X\x12\0\0\0__import__('this')tR",
        "a call of what a call returns": mkdir + b"(" + text + b"tR(" + text + b"tR",
        "a name": b"cthis\nd\n",
        "a name from the stack": b"\x8c\x04this\x8c\x01d\x93",
        "an instance": b"(" + text + b"iposix\nmkdir\n",
        "an object": b"(" + mkdir + text + b"o",
        "a new object": mkdir + b"(" + text + b"t\x81",
        "a new object with keywords": mkdir + b"(" + text + b"t}\x92",
        "a state": plan + b"}X\x01\0\0\0aK\x01sb",
        "a state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}X\x0c\0\0\0__defaults__)sb",
        "a state of a class of torch": b"ctorch\nTensor\nN}X\x03\0\0\0add" + mkdir + b"s\x86b",
        "items": plan + b"K\x01a(K\x02K\x03eK\x01K\x02s(K\x01K\x02u(K\x01\x90",
        "items of a set": b"\x8f(cthis\nd\n\x90",
        "registered code": b"\x82\x01",
        "an object elsewhere, by text": b"Pthis.d\n",
        "an object elsewhere": mkdir + b"Q",
    }


@pytest.mark.parametrize("attack", attacks(Path()))
def test_nothing_in_a_file_runs_or_is_imported(tmp_path: Path, good: Path, attack: str) -> None:
    path, mark = tmp_path / "a.ckpt", tmp_path / "ran"
    path.write_bytes((good / "good.ckpt").read_bytes())
    put_pickle(pickled_in(path)[:-1] + b"X\4\0\0\0more" + attacks(mark)[attack] + b"s.", path)
    tensor, defaults = dict(vars(Tensor)), torch._utils._rebuild_tensor_v2.__defaults__
    model = LitTiny()
    with contextlib.suppress(AdapterFileError):  # of a pickle that no program writes
        load_adapter(model, path)
        assert same(state(model), torch.load(good / "good.pt", weights_only=True))
    assert not mark.exists() and "this" not in sys.modules
    assert dict(vars(Tensor)) == tensor and torch._utils._rebuild_tensor_v2.__defaults__ is defaults


@pytest.mark.processes
def test_what_is_small_in_a_file_is_small_in_memory(tmp_path: Path, good: Path) -> None:
    checkpoint = torch.load(good / "good.ckpt", weights_only=True)
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    checkpoint["more"] = [Settings, laughs(), torch.ones(1).expand(1 << 30, 1 << 30), nested]
    torch.save(checkpoint, path := tmp_path / "a.ckpt")
    frugal(lambda: load_adapter(LitTiny(), path), most=1 << 27)


# What is plain is read as it is


def test_tensors_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.complex64]
    whole = OrderedDict(
        {str(dtype): values.to(dtype) for dtype in dtypes},
        rows=values[1, :, ::2].t(),
        same=values,
        empty=torch.empty(0, 3),
        flags=values > 5,
        parameter=nn.Parameter(values),
        one=torch.tensor(3),
        again=[values[0]],
    )
    torch.save([whole, Mode.FAST], path := tmp_path / "a.pt")
    (read, _), (expected, _) = load_plain(path), torch.load(path, weights_only=False)
    assert list(read) == list(expected) and torch.equal(read["again"][0], values[0])
    for name, value in read.items():
        if name != "again":
            assert torch.equal(value, expected[name]) and value.stride() == expected[name].stride()
    assert read["rows"].untyped_storage().data_ptr() == read["same"].untyped_storage().data_ptr()

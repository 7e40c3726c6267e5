"""What may befall a run: it is killed, its disk is full, its files are damaged or forged. Nothing is ever half done."""

import ctypes
import errno
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import (
    AdapterFileError,
    AdapterMismatchError,
    BaseMismatchError,
    LoRAConfig,
    LoRAError,
    inject_adapters,
    load_adapter,
    load_from_checkpoint,
    save_adapter,
)
from lightning_lora.model.view import View
from lightning_lora.storage.description import FORMAT, describe
from lightning_lora.storage.fingerprint import forms_of_base
from lightning_lora.tensors.values import digest
from tests.models import LitTiny, data, exact, lora, randomise, same, state, trainer

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and limits what a process may write"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse|quantize)"),
]
FORK: Any = multiprocessing.get_context("fork")
OURS = (LoRAError, FileNotFoundError, PermissionError)
A = "q_proj.lora_A"


def fork(work: Callable[[], object], seconds: float = 60) -> int:
    """Run ``work`` in a fork of this process, fail as it fails, kill it after a time; return the signal of its end."""
    receive, send = FORK.Pipe(duplex=False)

    def run() -> None:
        torch.set_num_threads(1)  # the other threads did not come along
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")  # what is wrong must be refused where a warning is no error
        with Path(os.devnull).open("w") as sys.stdout:
            sys.stderr = sys.stdout
            try:
                work()
            except BaseException:
                send.send(traceback.format_exc()[-20_000:])

    child = FORK.Process(target=run)
    child.start()
    send.close()
    child.join(seconds)
    child.kill()
    child.join()
    with suppress(EOFError):
        pytest.fail(receive.recv(), pytrace=False)
    return -int(child.exitcode)


def frugal(work: Callable[[], object], seconds: float = 60, most: int = 1 << 29) -> None:
    """Run ``work`` in a fork that may take so much time and memory, and no more."""

    def run() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), -1))  # so that this machine survives a failure
        work()
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < most

    assert fork(run, seconds) == 0, f"took more than {seconds} seconds, or crashed"


def limit(size: int, then: Any = signal.SIG_IGN) -> None:
    """From now on no file grows over ``size`` bytes: more is an error, or with ``SIG_DFL`` death between two bytes."""
    signal.signal(signal.SIGXFSZ, then)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))


def part_disks(crossing: Callable[[], None]) -> None:
    """Let each folder be a disk of its own, as the temporary one often is: a move from one to another is a copy."""

    def apart(move: Callable[..., None]) -> Callable[..., None]:
        def moved(source: Any, target: Any, **kwargs: Any) -> None:
            if Path(source).parent != Path(target).parent:
                crossing()
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
            move(source, target, **kwargs)

        return moved

    for name in ("rename", "replace"):
        setattr(os, name, apart(getattr(os, name)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kinds(model: nn.Module) -> list[Any]:
    parts = [(name, type(module), module.training) for name, module in model.named_modules()]
    return [*parts, *((name, type(p), p.requires_grad) for name, p in model.named_parameters())]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Expect ``model`` to be afterwards what it was, bit for bit."""
    before, kinds_before = state(model), kinds(model)
    yield
    assert same(state(model), before) and kinds(model) == kinds_before


def adapted(seed: int = 5) -> LitTiny:
    model = LitTiny()
    inject_adapters(model, lora().config)
    randomise(model, seed)
    return model


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let temporary files lie in a folder of this test's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


# Killed

EPOCHS = 24


class AtSave(L.Callback):
    """Do something when the Trainer begins to write its n-th file."""

    def __init__(self, n: int, do: Callable[[], object]) -> None:
        self.n, self.do = n, do

    def on_save_checkpoint(self, *_: Any) -> None:
        self.n -= 1
        if self.n == 0:
            self.do()


class Wait(L.Callback):
    """Wait to be killed after two epochs."""

    epochs = 0

    def on_train_epoch_start(self, *_: Any) -> None:
        if self.epochs == 2:
            signal.pause()
        self.epochs += 1


def shuffled() -> DataLoader[Any]:
    return DataLoader(data().dataset, batch_size=4, shuffle=True)


def newest(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def run(folder: Path, *callbacks: L.Callback, epochs: int = EPOCHS) -> dict[str, Tensor]:
    """Train with dropout and shuffling, from the newest whole file on if there is one; return the module's state."""
    torch.manual_seed(7)
    for path in [*newest(folder), None]:
        every = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True)
        model, t = LitTiny(), trainer(folder, [lora(dropout=0.3), every, *callbacks], max_epochs=epochs)
        with suppress(AdapterFileError):
            t.fit(model, shuffled(), data(), ckpt_path=path)
            break
    return state(model)


@exact
def test_run_that_is_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    killed, moments = tmp_path / "killed", random.Random(11)
    for kill in range(9):
        if kill % 3 == 1:
            die = partial(limit, moments.randrange(1, 15_000), signal.SIG_DFL)
            ended = fork(partial(run, killed, AtSave(moments.randint(1, 4), die)))
            assert ended == signal.SIGXFSZ
        else:
            assert fork(partial(run, killed, Wait()), seconds=moments.uniform(0.02, 0.5)) == signal.SIGKILL
        for path in newest(killed):
            load_adapter(LitTiny(), path)  # every file with a final name is whole
    assert len(newest(killed)) > 2
    assert fork(lambda: torch.save(run(killed), tmp_path / "end.pt")) == 0
    assert same(torch.load(tmp_path / "end.pt"), run(tmp_path / "through"))


def savers() -> dict[str, Callable[[LitTiny, Path], object]]:
    """Each way to write ``model``'s adapters to a file that is there already."""

    def attached(model: LitTiny, folder: Path) -> L.Trainer:
        t = trainer(folder, [lora(merge=False)], enable_checkpointing=False)
        t.validate(model, data(), verbose=False)
        return t

    return {
        "save_adapter": save_adapter,
        "save_checkpoint": lambda model, path: attached(model, path.parent).save_checkpoint(path),
        "weights only": lambda model, path: attached(model, path.parent).save_checkpoint(path, weights_only=True),
    }


SAVERS = savers()
saver = pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)


@saver
@pytest.mark.parametrize("moment", ["writing", "moving"])
def test_file_is_the_old_or_the_new_one_wherever_its_writer_is_killed(tmp_path: Path, save: Any, moment: str) -> None:
    path, old, new = tmp_path / "a.ckpt", adapted(1), adapted(2)
    save(old, path)
    size = path.stat().st_size
    for at in (0, 1, size // 2, size - 1):
        die = partial(limit, at, signal.SIG_DFL)

        def work(die: Any = die) -> None:
            part_disks(die)
            if moment == "writing":
                die()
            save(new, path)

        ended = fork(work)
        assert ended == signal.SIGXFSZ if moment == "writing" else ended in (0, signal.SIGXFSZ)
        model = LitTiny()
        load_adapter(model, path)
        assert same(state(model), state(old)) or (ended == 0 and same(state(model), state(new)))
        save(old, path)
    assert list(contents(tmp_path)) == ["a.ckpt"]  # what a killed writer left is not in the way, nor left for ever


# No room


@contextmanager
def full(_: Path) -> Iterator[None]:
    limit(1000)
    yield
    limit(-1)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())  # not even for root
    paths = [*folder.glob("*.*"), folder]
    for path in paths:
        path.chmod(0o555)
    yield
    for path in paths:
        path.chmod(0o755)


fault = pytest.mark.parametrize("fault", [full, read_only])


def says(path: Path) -> str:
    """An expression for what an error says: which file, and what to do about it."""
    return rf"(?s){re.escape(path.name)}.*\. (Free|Make|Choose|Pass|Give|Save|Write)\b"


@saver
@fault
@pytest.mark.parametrize("again", [False, True], ids=["new", "over an old file"])
def test_file_that_cannot_be_written_is_an_error_and_changes_nothing(
    tmp_path: Path, fault: Any, save: Any, again: bool
) -> None:
    def work() -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        model, path = adapted(), folder / "a.ckpt"
        if again:
            save(adapted(1), path)
        before = contents(folder)
        with unchanged(model), fault(folder), pytest.raises((LoRAError, OSError), match=says(path)):
            save(model, path)
        assert contents(folder) == before
        save(model, path)
        loaded = LitTiny()
        load_adapter(loaded, path)
        assert same(state(loaded), state(model)) and list(contents(folder)) == ["a.ckpt"]

    assert fork(work) == 0


@saver
def test_disk_that_is_full_behind_the_temporary_folder_costs_no_file(
    tmp_path: Path, temporary: Path, save: Any
) -> None:
    def work() -> None:
        path, old, new, loaded = tmp_path / "a.ckpt", adapted(1), adapted(2), LitTiny()
        save(old, path)
        part_disks(partial(limit, 1000))
        with suppress(LoRAError, OSError):
            save(new, path)
            old = new
        load_adapter(loaded, path)
        assert same(state(loaded), state(old))
        assert list(contents(tmp_path)) == ["a.ckpt"]

    assert fork(work) == 0


@exact
@fault
@pytest.mark.parametrize("go_on", ["same trainer", "new trainer", "saved elsewhere"])
def test_run_whose_checkpoint_cannot_be_written_can_go_on(tmp_path: Path, fault: Any, go_on: str) -> None:
    def work() -> None:
        through = run(tmp_path / "through", epochs=4)
        folder, stack = tmp_path / "folder", ExitStack()
        seen: dict[str, Any] = {}

        def happen() -> None:
            seen.update(files=contents(folder), state=state(model), kinds=kinds(model))
            stack.enter_context(fault(folder))

        model, every = LitTiny(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        t = trainer(tmp_path, [lora(dropout=0.3), every, AtSave(3, happen)], max_epochs=4)
        torch.manual_seed(7)
        with stack, pytest.raises((LoRAError, OSError), match=says(folder / "epoch=2.ckpt")):
            t.fit(model, shuffled(), data())
        assert contents(folder) == seen["files"]
        assert same(state(model), seen["state"]) and kinds(model) == seen["kinds"]
        path = folder / "epoch=1.ckpt"
        if go_on == "saved elsewhere":
            t.save_checkpoint(path := tmp_path / "rescue.ckpt")
        if go_on != "same trainer":
            model, t = LitTiny(), trainer(tmp_path, [lora(dropout=0.3)], max_epochs=4)
        torch.manual_seed(8)
        t.fit(model, shuffled(), data(), ckpt_path=path)
        assert same(state(model), through)

    assert fork(work) == 0


# Damaged files


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of each kind, and what they hold."""
    folder, model = tmp_path_factory.mktemp("good"), adapted(3)
    t = trainer(folder, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    t.save_checkpoint(folder / "good.ckpt")
    save_adapter(model, folder / "good.safetensors")
    torch.save(state(model), folder / "good.pt")
    return folder


def with_trainer(stage: str, model: LitTiny, path: Path) -> None:
    t = trainer(path.parent, [lora(merge=False)], max_epochs=2, enable_checkpointing=False)
    getattr(t, stage)(model, data(), ckpt_path=path)


WAYS: dict[str, Callable[[LitTiny, Path], object]] = {
    "load_adapter": load_adapter,
    "load_from_checkpoint": lambda _, path: load_from_checkpoint(LitTiny, path),
    "fit": partial(with_trainer, "fit"),
    "test": partial(with_trainer, "test"),
}


def refused(path: Path, *ways: str, builds: Sequence[Callable[[], LitTiny]] = (LitTiny, adapted)) -> None:
    """Expect ``path`` to be refused in every way in which it could be loaded, and a model to be what it was."""
    for way, build in product(ways or WAYS, builds):
        with unchanged(model := build()), pytest.raises(OURS):
            WAYS[way](model, path)


KINDS = pytest.mark.parametrize("kind", ["safetensors", "ckpt"])


@KINDS
def test_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path, good: Path, kind: str) -> None:
    content, path = (good / f"good.{kind}").read_bytes(), tmp_path / f"cut.{kind}"
    size = len(content)
    for cut in {*range(12), *range(0, size, size // 40), *range(size - 70, size, 7), size - 1}:
        path.write_bytes(content[:cut])
        refused(path, "load_adapter")
    for cut in (0, 1, 3, size // 3, size - 22, size - 1):
        path.write_bytes(content[:cut])
        refused(path)


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3)


def flip(content: bytes, flips: list[tuple[float, int]]) -> bytes:
    changed = bytearray(content)
    for place, bit in flips:
        changed[int(place * len(changed))] ^= 1 << bit
    return bytes(changed)


@KINDS
def test_flipped_bits_are_refused_or_change_nothing(tmp_path: Path, good: Path, kind: str) -> None:
    content, path = (good / f"good.{kind}").read_bytes(), tmp_path / f"flipped.{kind}"
    written = torch.load(good / "good.pt")

    @settings(deadline=None, database=None, max_examples=150)
    @given(flips=FLIPS)
    def check(flips: list[tuple[float, int]]) -> None:
        path.write_bytes(flip(content, flips))
        model = LitTiny()
        before, kinds_before = state(model), kinds(model)
        try:
            load_adapter(model, path)
            assert same(state(model), written)
        except (AdapterFileError, AdapterMismatchError, BaseMismatchError):
            assert same(state(model), before) and kinds(model) == kinds_before

    check()


def test_flipped_bits_are_refused_or_the_resumed_run_is_the_same(tmp_path: Path, good: Path) -> None:
    def resumed(path: Path) -> dict[str, Tensor]:
        model = LitTiny()
        with_trainer("fit", model, path)
        return state(model)

    content, path, through = (good / "good.ckpt").read_bytes(), tmp_path / "flipped.ckpt", resumed(good / "good.ckpt")

    @settings(deadline=None, database=None, max_examples=60)
    @given(flips=FLIPS)
    def check(flips: list[tuple[float, int]]) -> None:
        path.write_bytes(flip(content, flips))
        with suppress(AdapterFileError, AdapterMismatchError, BaseMismatchError):
            assert same(resumed(path), through)

    check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.complex64], ids=str)
def test_any_flipped_bit_and_any_moved_row_is_another_digest(dtype: torch.dtype) -> None:
    tensor = torch.arange(1, 9).to(dtype)
    seen, content = {digest(tensor)}, tensor.view(torch.uint8)
    for place in range(len(content)):
        for bit in range(8):
            content[place] ^= 1 << bit
            seen.add(digest(tensor))
            content[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(content)
    assert digest(-tensor) not in seen
    a, b = torch.tensor([1, 2]).to(dtype), torch.tensor([3, 4]).to(dtype)
    assert digest(torch.stack([a, b, b, a])) != digest(torch.stack([b, a, a, b]))
    a, b = a.repeat(1 << 17), b.repeat(1 << 17)
    assert digest(torch.stack([a, b, b, a])) != digest(torch.stack([b, a, a, b]))


# Forged files


def forge(path: Path, good: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write the good checkpoint with a change, and a checksum that is as it was."""
    checkpoint = torch.load(good / "good.ckpt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


def put(name: Any, make: Callable[[], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint["state_dict"].update({name: make()})


def say(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint["lightning_lora"].update(fields)


def laughs(depth: int = 40) -> list[Any]:
    """A list that is small in a pickle, and endless for whoever walks through it."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found, found]
    return found


def endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


ONE = torch.ones(1, 1)
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
    "endless base": say(base=endless()),
    "base that explodes": say(base=laughs()),
    "target_modules that explode": lambda checkpoint: checkpoint["lightning_lora"]["config"].update(
        target_modules=laughs()
    ),
    "expression of a thousand parts": lambda checkpoint: checkpoint["lightning_lora"]["config"].update(
        target_modules="(" * 500 + ")" * 500
    ),
    "no description": lambda checkpoint: checkpoint.update(lightning_lora=None),
    "tensor as description": lambda checkpoint: checkpoint.update(lightning_lora=torch.ones(2)),
    "list as state": lambda checkpoint: checkpoint.update(state_dict=[]),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_forged_checkpoint_is_refused_at_no_cost(tmp_path: Path, good: Path, change: Any) -> None:
    forge(tmp_path / "forged.ckpt", good, change)
    frugal(partial(refused, tmp_path / "forged.ckpt"))


JUNK: list[Any] = [
    None, True, -1, 2, 10**400, 0.5, float("nan"), "x", "(", "", b"x", [], [1], [[]], [None], {}, {"a": 1},
    {1: 2, "a": 3}, {1}, torch.ones(2), [torch.ones(2)], endless(), [{"layout": 1, "dtypes": 2, "digests": 3}],
    [{"layout": torch.ones(2), "dtypes": [], "digests": [torch.ones(2)]}],
]  # fmt: skip


def test_description_of_wrong_types_is_refused(tmp_path: Path, good: Path) -> None:
    def work() -> None:
        said = torch.load(good / "good.ckpt", weights_only=True)["lightning_lora"]
        config, path = said["config"], tmp_path / "a.ckpt"
        places = [(said, field) for field in (*said, "more")] + [(config, field) for field in config]
        for (whole, field), junk in product(places, JUNK):
            if field in whole and repr(junk) == repr(whole[field]):
                continue  # what it said anyway
            forge(path, good, say(**{field: junk}) if whole is said else say(config={**config, field: junk}))
            with unchanged(model := LitTiny()), pytest.raises(LoRAError):
                load_adapter(model, path)

    frugal(work)


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


@pytest.mark.parametrize("text", METADATA.values(), ids=METADATA)
def test_metadata_of_wrong_types_is_refused(tmp_path: Path, good: Path, text: str) -> None:
    save_file(load_file(good / "good.safetensors"), tmp_path / "a.safetensors", {"lightning_lora": text})
    frugal(partial(refused, tmp_path / "a.safetensors"))


def test_what_is_no_file_of_adapters_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.ckpt")
    (tmp_path / "folder.ckpt").mkdir()
    for size in (0, 1, 7, 1 << 31, 1 << 62, (1 << 64) - 1):
        (tmp_path / f"header of {size}.safetensors").write_bytes(struct.pack("<Q", size) + b"{}" + bytes(90))
    for name, content in {
        "empty": b"",
        "P": b"P",
        "PK": b"PK",
        "end": b"PK\5\6" + bytes(18),
        "zeros": bytes(99),
    }.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    for path in [*tmp_path.iterdir(), tmp_path / "none.ckpt", tmp_path / ("n" * 300), tmp_path / "empty.ckpt" / "a"]:
        frugal(partial(refused, path))


DIVERGED = {
    "nan": (A, torch.full((2, 8), float("nan"))),
    "inf": ("v_proj.lora_B", torch.full((8, 2), float("inf"))),
    "-inf at one place": (A, torch.ones(2, 8).index_fill(1, torch.tensor([7]), -float("inf"))),
    "too large for the model": (A, torch.full((2, 8), 1e300, dtype=torch.float64)),
}


@pytest.mark.parametrize(("name", "value"), DIVERGED.values(), ids=DIVERGED)
def test_adapters_that_diverged_are_refused_though_their_file_is_whole(
    tmp_path: Path, good: Path, name: str, value: Tensor
) -> None:
    def change(checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"][name] = value
        checkpoint["lightning_lora"] = describe(view := View(adapted()), checkpoint["state_dict"], forms_of_base(view))

    forge(tmp_path / "a.ckpt", good, change)
    refused(tmp_path / "a.ckpt")
    written = torch.load(tmp_path / "a.ckpt")
    said = {"lightning_lora": json.dumps(written["lightning_lora"])}
    save_file(written["state_dict"], tmp_path / "a.safetensors", said)
    refused(tmp_path / "a.safetensors", "load_adapter")


class Runs:
    """What a pickle runs as it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


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
        refused(tmp_path / f"{name}.ckpt")
        assert not mark.exists()


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


MANY = 1_000_000


def test_million_keys_are_refused_in_bounded_time_and_memory(tmp_path: Path, good: Path) -> None:
    with safe_open(good / "good.safetensors", "pt") as opened:
        entries = ['"__metadata__":' + json.dumps(opened.metadata())]
    entries += [f'"k{i}":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * i},{4 * i + 4}]}}' for i in range(MANY)]
    header = ("{" + ",".join(entries) + "}").encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4 * MANY))
    forge(tmp_path / "a.ckpt", good, lambda whole: whole["state_dict"].update({f"k{i}": ONE for i in range(MANY)}))
    for name, way in (("a.safetensors", "load_adapter"), ("a.ckpt", "load_adapter"), ("a.ckpt", "test")):
        frugal(partial(refused, tmp_path / name, way, builds=[LitTiny]), most=1 << 30)


@pytest.mark.parametrize("maker", [b"builtins\nbytearray", b"torch\nFloatTensor"])
def test_pickle_that_only_names_a_size_is_refused(tmp_path: Path, maker: bytes) -> None:
    bomb = b"\x80\x02c" + maker + b"\nJ\x00\x00\x00\x70\x85R."
    path = tmp_path / "a.ckpt"
    torch.save({}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in records.items():
            archive.writestr(name, bomb if name.endswith("data.pkl") else contents)
    with pytest.raises(AdapterFileError, match=r"is damaged: .*data.pkl"):
        load_adapter(LitTiny(), path)


def test_several_writers_of_one_file_leave_a_whole_one(tmp_path: Path) -> None:
    model = LitTiny()
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["head"]))
    path = tmp_path / "a.safetensors"

    def write() -> None:
        for _ in range(50):
            save_adapter(model, path)

    writers = [FORK.Process(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    load_adapter(LitTiny(), path)
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]


def test_honest_tensors_with_attributes_are_no_damage(tmp_path: Path) -> None:
    class Keeps(L.Callback):
        def state_dict(self) -> dict[str, Any]:
            tagged = torch.ones(2)
            tagged.tag = "a"  # type: ignore[attr-defined]
            return {"tagged": tagged}

    saves = ModelCheckpoint(tmp_path, "a")
    trainer(tmp_path, [lora(), Keeps(), saves], max_epochs=1).fit(LitTiny(), data())
    trainer(tmp_path, [lora(), Keeps()]).fit(LitTiny(), data(), ckpt_path=tmp_path / "a.ckpt")

"""Files are written whole."""

import errno
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import AdapterFileError, LoRAError, load_adapter, save_adapter
from lightning_lora.storage.formats.own import read_adapter_file
from lightning_lora.storage.formats.written_files import write_files
from lightning_lora.storage.on_disk.whole_files import writing
from tests.support.compared import assert_same_tensors
from tests.support.faults import (
    FORK,
    adapted,
    contents,
    fork,
    forks,
    in_fork,
    limit,
    read_only,
    unchanged,
)
from tests.support.models import (
    LitTiny,
    as_trained,
    data,
    exact,
    lora,
    same,
    state,
    trainer,
)
from tests.support.storage import fitted, goes_on, restores

pytestmark = forks


# Killed


class AtSave(L.Callback):
    """Do something when the Trainer begins to write its n-th file."""

    def __init__(self, n: int, do: Callable[[], object]) -> None:
        self.n = n
        self.do = do

    def on_save_checkpoint(self, *_: Any) -> None:
        self.n -= 1
        if self.n == 0:
            self.do()


class Dies(L.Callback):
    """Die after two epochs, if not before."""

    epochs = 0

    def on_train_epoch_start(self, *_: Any) -> None:
        if self.epochs == 2:
            signal.raise_signal(signal.SIGPROF)
        self.epochs += 1


def newest(folder: Path) -> list[Path]:
    return sorted(
        folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True
    )


def run(folder: Path, *callbacks: L.Callback) -> dict[str, Tensor]:
    """Train with dropout and shuffling, from the newest whole file on if there is one; return the module's state."""
    torch.manual_seed(7)
    for path in [*newest(folder), None]:
        every = ModelCheckpoint(
            folder, filename="{epoch}", save_top_k=-1, save_last=True
        )
        model = LitTiny()
        t = trainer(folder, [lora(dropout=0.3), every, *callbacks], max_epochs=12)
        with suppress(AdapterFileError):
            t.fit(
                model,
                DataLoader(data().dataset, 4, shuffle=True),
                data(),
                ckpt_path=path,
            )
            break
    return state(model)


def run_and_die(folder: Path, moments: random.Random) -> None:
    """Let a run die at any moment."""
    work = partial(run, folder, Dies())
    assert fork(work, seconds=moments.uniform(0.02, 0.5)) == signal.SIGPROF


def run_and_die_as_it_saves(folder: Path, moments: random.Random) -> None:
    """Let a run die in the middle of a file."""
    die = partial(limit, moments.randrange(1, 15_000), signal.SIG_DFL)
    work = partial(run, folder, AtSave(moments.randint(1, 4), die))
    assert fork(work) == signal.SIGXFSZ


@pytest.mark.processes
@exact
def test_run_that_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    killed = tmp_path / "killed"
    end = tmp_path / "end.pt"
    moments = random.Random(11)
    for kill in [run_and_die, run_and_die_as_it_saves, run_and_die] * 2:
        kill(killed, moments)
        for path in newest(killed):
            load_adapter(LitTiny(), path)  # every file with a final name is whole
    assert len(newest(killed)) > 2
    assert fork(lambda: torch.save(run(killed), end)) == 0
    assert_same_tensors(torch.load(end, weights_only=True), run(tmp_path / "through"))


def part_disks(crossing: Callable[[], None]) -> None:
    """Let each folder be a disk of its own, as the temporary one often is: a move from one to another is a copy."""

    def apart(move: Callable[..., None]) -> Callable[..., None]:
        def moved(source: Any, target: Any, **kwargs: Any) -> None:
            if Path(source).parent != Path(target).parent:
                crossing()
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
            move(source, target, **kwargs)

        return moved

    os.rename = apart(os.rename)
    os.replace = apart(os.replace)


def save_checkpoint(model: LitTiny, path: Path) -> None:
    t = trainer(path.parent, [lora(merge=False)], enable_checkpointing=False)
    t.validate(model, data(), verbose=False)
    t.save_checkpoint(path)


def name_for(save: Any) -> str:
    return "a.safetensors" if save is save_adapter else "a.ckpt"


def is_model(found: LitTiny, expected: LitTiny) -> bool:
    return same(state(found), state(expected))


@pytest.mark.processes
@pytest.mark.parametrize("save", [save_adapter, save_checkpoint])
def test_file_is_the_old_or_the_new_one_wherever_its_writer_is_killed(
    tmp_path: Path, save: Any
) -> None:
    path = tmp_path / name_for(save)
    old = adapted(1)
    save(old, path)
    size = path.stat().st_size
    for at in (0, 1, size // 2, size - 1):

        def work(at: int = at) -> None:
            limit(at, signal.SIG_DFL)
            save(adapted(2), path)

        assert fork(work) == signal.SIGXFSZ
        model = LitTiny()
        load_adapter(model, path)
        assert is_model(model, old)


# No room


@contextmanager
def full(_: Path) -> Iterator[None]:
    limit(1000)
    yield
    limit(-1)


@pytest.mark.parametrize("save", [save_adapter, save_checkpoint])
@pytest.mark.parametrize("fault", [full, read_only])
@in_fork
def test_file_that_cannot_be_written_is_an_error_and_changes_nothing(
    tmp_path: Path, fault: Any, save: Any
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    model = adapted()
    path = folder / name_for(save)
    save(adapted(1), path)
    before = contents(folder)
    with (
        unchanged(model),
        fault(folder),
        pytest.raises(LoRAError, match=f"{path.name} could not be .*Free space"),
    ):
        save(model, path)
    assert contents(folder) == before
    save(model, path)
    restores(path, model)
    assert list(contents(folder)) == [name_for(save)]


# What killed writers leave


def killed_as_it_saves(folder: Path, save: str) -> None:
    """Let a run die while the file of its second step is half there."""

    def work() -> None:
        part_disks(partial(limit, 2000, signal.SIG_DFL))
        trainer(folder, [lora(save=save), of_steps(folder)], max_epochs=1).fit(
            LitTiny(), data()
        )

    assert fork(work) == signal.SIGXFSZ
    assert len(parts(folder)) == 1
    assert "step=2" in parts(folder)[0]


def of_steps(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=2, save_top_k=-1
    )


def parts(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(".*")]


@pytest.mark.processes
@pytest.mark.parametrize("save", ["adapters", "model"])
def test_what_a_killed_run_left_is_gone_when_the_next_one_saves_or_goes_on(
    tmp_path: Path, save: str
) -> None:
    killed_as_it_saves(tmp_path, save)
    save_adapter(adapted(), tmp_path / "of another name.safetensors")
    assert not parts(tmp_path)
    file = tmp_path / "a.ckpt"
    fitted(file)
    killed_as_it_saves(tmp_path, save)
    goes_on(file)  # which writes no file
    assert not parts(tmp_path)


@contextmanager
def another_process() -> Iterator[int]:
    """The number of a process that does nothing."""
    process = FORK.Process(target=time.sleep, args=[600])
    process.start()
    yield process.pid
    process.kill()
    process.join()


def test_what_a_live_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with writing(path) as part, another_process() as number:
        part.write_bytes(b"mine")
        other = part.with_name(part.name.replace(f"-{os.getpid()}-", f"-{number}-"))
        other.write_bytes(b"half")
        os.utime(other, (0, 0))  # however long it takes
        save_adapter(adapted(), path)
        assert other.exists()
    assert path.read_bytes() == b"mine"  # the other writer has left this file alone
    save_adapter(adapted(), path)  # now that the process is gone
    assert list(contents(tmp_path)) == [path.name]


def test_what_a_killed_process_of_the_same_number_left_is_cleared(
    tmp_path: Path,
) -> None:
    """Those of containers often have."""
    with writing(tmp_path / "a.safetensors") as part:
        part.write_bytes(b"whole")
    part.write_bytes(b"half")
    save_adapter(adapted(), tmp_path / "b.safetensors")
    assert not parts(tmp_path)


def of_another_machine(name: str) -> str:
    return re.sub("lora-.{8}-", "lora-01234567-", name)


def of_0_2_0(name: str) -> str:
    return re.sub(r"lora-.*\.part", f"{'0123' * 8}.part", name)


@pytest.mark.parametrize("rename", [of_another_machine, of_0_2_0])
def test_what_another_machine_left_is_cleared_an_hour_later(
    tmp_path: Path, rename: Callable[[str], str]
) -> None:
    """Its numbers of processes say nothing here."""
    with writing(tmp_path / "a.safetensors") as part:
        part.write_bytes(b"whole")
    left = part.with_name(rename(part.name))
    left.write_bytes(b"half")
    save_adapter(adapted(), tmp_path / "b.safetensors")
    assert left.exists()
    os.utime(left, (0, 0))
    save_adapter(adapted(), tmp_path / "b.safetensors")
    assert not left.exists()


@pytest.mark.processes
def test_file_is_the_old_or_the_new_one_wherever_its_writer_is_killed_as_it_is_moved(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.ckpt"
    old = adapted(1)
    new = adapted(2)
    save_checkpoint(old, path)
    size = path.stat().st_size
    for at in (0, 1, size // 2, size - 1):

        def work(at: int = at) -> None:
            part_disks(partial(limit, at, signal.SIG_DFL))
            save_checkpoint(new, path)

        ended = fork(work)
        assert ended in (0, signal.SIGXFSZ)
        model = LitTiny()
        load_adapter(model, path)
        assert is_model(model, old) or (ended == 0 and is_model(model, new))
        save_checkpoint(old, path)


@pytest.mark.parametrize(
    "name", [".download.part", ".a.lora-x.part", "a.lora-01234567-1-1.part"]
)
def test_files_of_others_stay(tmp_path: Path, name: str) -> None:
    other = tmp_path / name
    other.touch()
    os.utime(other, (0, 0))
    save_adapter(adapted(), tmp_path / "a.safetensors")
    assert contents(tmp_path)[name] == b""


# Replaced


@contextmanager
def replacing(path: Path, others: list[Path]) -> Iterator[None]:
    """Let a thread put other files in the place of one, again and again, each at once as :func:`writing` does."""
    is_over = Event()

    def work() -> None:
        while not is_over.is_set():
            for other in others:
                new = shutil.copyfile(other, path.with_suffix(".new"))
                new.replace(path)

    thread = Thread(target=work)
    thread.start()
    yield
    is_over.set()
    thread.join()


def test_a_file_that_is_replaced_while_it_is_read_is_the_old_or_the_new_one(
    tmp_path: Path,
) -> None:
    """What is read comes from one open file.

    Two looks at one path would see the header of another file.
    """
    path = tmp_path / "a.safetensors"
    low = tmp_path / "2.safetensors"
    high = tmp_path / "5.safetensors"
    save_adapter(as_trained(LitTiny(), r=2), low)
    save_adapter(as_trained(LitTiny(), r=5), high)
    shutil.copyfile(low, path)
    with replacing(path, [low, high]):
        for _ in range(1000):
            assert read_adapter_file(path).config.r in (2, 5)


def test_a_pipe_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    os.mkfifo(path)
    with pytest.raises(
        AdapterFileError, match="is a device or a pipe, which a file would replace"
    ):
        save_adapter(adapted(), path)
    assert path.is_fifo()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_stays_after_a_failed_write_if_it_was_there_before(
    tmp_path: Path, is_there: bool
) -> None:
    folder = tmp_path / "a"
    if is_there:
        folder.mkdir()
    with pytest.raises(AdapterFileError):
        write_files(folder, {"a": b"", "missing/b": b""})
    assert folder.exists() == is_there

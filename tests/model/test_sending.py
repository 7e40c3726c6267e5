"""What a fit elsewhere remembers is found by its weights, and is safe to read."""

import copy
import errno
import multiprocessing
import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.errors import LoRAWarning
from lightning_lora.layers import ADAPTERS, LoRALayer, register_adapter
from lightning_lora.model import sending
from lightning_lora.model.record import forget_record, receive, send
from lightning_lora.model.sending import make_folder
from tests.support.cases import Three
from tests.support.faults import fork
from tests.support.layers import Experts
from tests.support.models import LitTiny, data, is_plain, lora, randomise, same, state, trainer

MEMORY = "LIGHTNING_LORA_MEMORY"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a program that made it in this process."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv(MEMORY, raising=False)
    make_folder()
    return Path(os.environ[MEMORY])


def left(model: nn.Module, **config: Any) -> nn.Module:
    """The model as it was adapted; ``model`` itself becomes a plain one with nothing but the merged weights."""
    ll.inject_adapters(model, ll.LoRAConfig(**({"r": 2} | config)))
    randomise(model)
    adapted = copy.deepcopy(model)
    ll.merge_adapters(model)
    send(model)
    forget_record(model)
    return adapted


@pytest.fixture
def sent_home() -> tuple[nn.Module, LitTiny]:
    """A module as it was adapted in another process, and a plain one with nothing but the merged weights."""
    home = LitTiny()
    return left(home, modules_to_save=["head"]), home


def test_resting_adapters_are_sent_too() -> None:
    home, config = LitTiny(), ll.LoRAConfig(r=2, modules_to_save=["head"])
    for name in ("fr", "de"):
        ll.inject_adapters(home, config, name=name)
        randomise(home, seed=len(name))
        torch.nn.init.ones_(home.head.weight)
    adapted = copy.deepcopy(home)
    ll.set_adapter(home, "fr")
    ll.set_adapter(home, "de")
    ll.merge_adapters(home)
    send(home)
    forget_record(home)
    ll.unmerge_adapters(home)
    for name in ("de", "fr", "de"):
        for model in (home, adapted):
            ll.set_adapter(model, name)
        assert ll.adapters(home)[0] == name and same(state(home), state(adapted))


def test_a_block_that_finds_the_record_shows_afterwards_what_was_shown_before(sent_home: Any) -> None:
    _, home = sent_home
    merged = state(home)
    with ll.disable_adapters(home):
        assert not same(state(home), merged)
    assert same(state(home), merged)


def test_a_new_base_is_one_once_its_memory_is_removed(sent_home: tuple[nn.Module, LitTiny]) -> None:
    _, home = sent_home
    weights = state(home)
    ll.remove_adapters(home)
    assert same(state(home), weights)
    with pytest.raises(ll.AdapterStateError, match="has no adapters"):
        ll.unmerge_adapters(home)


def test_other_weights_remember_nothing(sent_home: tuple[nn.Module, LitTiny]) -> None:
    _, home = sent_home
    with torch.no_grad():
        home.q_proj.weight.add_(1)
    with pytest.raises(ll.AdapterStateError, match="has no adapters"):
        ll.unmerge_adapters(home)


# Whatever a record holds


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "layers": (Three, {"target_modules": "all"}),
    "dora": (Three, {"target_modules": "all", "use_dora": True}),
    "pissa": (LitTiny, {"init": "pissa"}),
    "slices": (LitTiny, {"target_modules": ["q_proj"], "target_slices": {"q_proj": {"a": [0, 4]}}}),
    "parameters": (lambda: nn.Sequential(Experts(), nn.Linear(4, 4)), {"target_parameters": ["stack"]}),
    "attention": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.LSTM(8, 8)), {"target_modules": "all"}),
    "buffers": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), {"modules_to_save": ["1"], "bias": "all"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_adapter_comes_back(case: str) -> None:
    build, config = CASES[case]
    home = build()
    adapted = left(home, **config)
    ll.unmerge_adapters(home)
    assert same(state(home), state(adapted))
    ll.remove_adapters(home)
    ll.remove_adapters(adapted)
    assert same(state(home), state(adapted))


def test_a_class_that_the_main_process_does_not_know_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Linear):
        pass

    class LoRAOwn(LoRALayer):
        lora_is_linear = True

    home = nn.Sequential(Own(4, 4))
    monkeypatch.setitem(ADAPTERS, Own, LoRAOwn)
    register_adapter(Own, LoRAOwn)
    left(home)
    monkeypatch.delitem(ADAPTERS, Own)
    with pytest.raises(ll.AdapterStateError, match=r"LoRAOwn, which is not known here.*register_adapter"):
        ll.unmerge_adapters(home)
    monkeypatch.setitem(ADAPTERS, Own, LoRAOwn)
    ll.unmerge_adapters(home)
    ll.remove_adapters(home)


# What others may have put there


def is_found(home: nn.Module) -> bool:
    return receive(copy.deepcopy(home)) is not None


class RunsCode:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_stored_record_does_not_run(folder: Path, tmp_path: Path, sent_home: Any, archive: bool) -> None:
    (entry,) = folder.iterdir()
    planted = sending._load(entry, mmap=False) | {"record": RunsCode(tmp_path / "ran")}
    if archive:
        torch.save(planted, entry)
    else:
        entry.write_bytes(pickle.dumps(planted))
    with pytest.warns(LoRAWarning, match="cannot be read, and is skipped"):
        assert not is_found(sent_home[1])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", ["mode", "link", "owner", "file", "gone"])
def test_a_folder_that_another_user_may_have_made_is_unused(
    folder: Path, sent_home: Any, way: str, monkeypatch: Any
) -> None:
    _, home = sent_home
    if way == "mode":
        folder.chmod(0o770)
    elif way == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    else:
        folder.rename(folder.with_name("elsewhere"))
    if way == "link":
        folder.symlink_to(folder.with_name("elsewhere"))
    elif way == "file":
        folder.touch()
    before = sorted(folder.parent.rglob("*"))
    assert not is_found(home)
    with pytest.warns(LoRAWarning, match="no temporary folder that only this user can write to"):
        left(LitTiny())
    assert sorted(folder.parent.rglob("*")) == before


def test_a_half_written_record_is_skipped(folder: Path, sent_home: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, home = sent_home
    (entry,) = folder.iterdir()
    entry.with_name("1.part").write_bytes(entry.read_bytes()[:100])
    assert is_found(home)
    save = torch.save

    def full(value: Any, path: Path) -> None:
        save(value, path)
        path.write_bytes(path.read_bytes()[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    before = sorted(folder.iterdir())
    with pytest.warns(LoRAWarning, match=r"not the adapters and the base \(OSError: .*No space left.*free space"):
        left(LitTiny())
    assert sorted(folder.iterdir()) == before


# Its life


@pytest.mark.processes
def test_the_program_deletes_what_it_has_read_and_its_workers_leave_it(folder: Path, sent_home: Any) -> None:
    _, home = sent_home

    def work() -> None:
        make_folder()
        assert os.environ[MEMORY] == str(folder) and is_found(home)

    assert fork(work) == 0
    assert len(list(folder.iterdir())) == 1
    ll.unmerge_adapters(home)
    assert not list(folder.iterdir())


@pytest.mark.processes
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_worker_of_a_program_without_a_folder_deletes_its_own(start: str, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.delenv(MEMORY)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    context = multiprocessing.get_context(start)
    messages = context.Queue()
    worker = context.Process(target=_tell_folder, args=(messages,))
    worker.start()
    told = Path(messages.get(timeout=60))
    worker.join()
    assert told.parent == tmp_path and not told.exists()


def _tell_folder(messages: Any) -> None:
    make_folder()
    messages.put(os.environ[MEMORY])


def test_a_program_that_another_one_started_makes_its_own_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_lora.model.sending._MADE", {})  # as in a new process
    make_folder()
    mine = Path(os.environ[MEMORY])
    assert mine != folder and mine.is_dir() and folder.is_dir()
    make_folder()
    assert Path(os.environ[MEMORY]) == mine


@pytest.mark.processes
def test_a_worker_whose_program_has_ended_stores_nothing_where_its_folder_was(folder: Path) -> None:
    folder.rmdir()

    def work() -> None:
        with pytest.warns(LoRAWarning, match="no temporary folder"):
            left(LitTiny())
        assert not folder.exists()
        make_folder()  # for fits of its own
        assert os.environ[MEMORY] != str(folder) and Path(os.environ[MEMORY]).is_dir()

    assert fork(work) == 0
    assert not folder.exists()


@pytest.mark.processes
def test_a_fit_without_a_temporary_folder_says_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def say(message: Any, *_: Any, **__: Any) -> None:
        (tmp_path / "said.txt").write_text(str(message))

    monkeypatch.delenv(MEMORY)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", refuse)
        callback = lora()
    assert MEMORY not in os.environ
    model, base = LitTiny(), LitTiny()
    with warnings.catch_warnings():
        warnings.simplefilter("always", LoRAWarning)
        monkeypatch.setattr(warnings, "showwarning", say)  # in another process
        options = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": False, "max_epochs": 1}
        trainer(tmp_path, [callback], **options).fit(model, data())
    assert is_plain(model) and not torch.equal(model.q_proj.weight, base.q_proj.weight)
    assert "The fit is complete" in (tmp_path / "said.txt").read_text()
    with pytest.raises(ll.AdapterStateError, match="has no adapters"):
        ll.unmerge_adapters(model)


def test_the_folder_goes_with_the_process_that_made_it_alone(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert fork(lambda: sending._delete(folder)) == 0
    assert folder.exists()
    sending._delete(folder)
    assert not folder.exists()

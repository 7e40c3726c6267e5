"""The record of a fit in other processes comes to the main process whole, or the warning says what is lost."""

import errno
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import ADAPTERS, LoRALayer, register_adapter
from lightning_lora.training import returned_records
from tests.support.compared import assert_same_tensors
from tests.support.kept import Kept
from tests.support.models import (
    LitTiny,
    as_merged,
    data,
    is_plain,
    lora,
    state,
    trainer,
)


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder, in which nothing is left in the end."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    yield tmp_path / "temporary"
    assert not list((tmp_path / "temporary").rglob("lightning_lora*"))


class Own(nn.Linear):
    pass


class LoRAOwn(LoRALayer):
    lora_is_linear = True


class WithOwn(Kept):
    """Layers of many kinds, one of them the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.two = Own(4, 4)


@pytest.mark.processes
def test_every_kind_of_adapter_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as users set it who want torch to read safely
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setitem(ADAPTERS, Own, LoRAOwn)
    register_adapter(Own, LoRAOwn)
    torch.manual_seed(0)
    model = WithOwn()
    expected = WithOwn()
    expected.load_state_dict(model.state_dict())
    callback = ll.LoRACallback(
        r=2,
        target_modules="all",
        target_slices={"one": {"a": [0, 2]}},
        trainable_token_indices={"words": [1, 2]},
        bias="all",
        modules_to_save=["head", "norm"],
    )
    t = trainer(tmp_path, [callback], strategy="ddp_fork", max_epochs=1)
    t.fit(model)
    ll.load_adapter(expected, t.checkpoint_callback.best_model_path)  # type: ignore[union-attr,arg-type]
    ll.unmerge_adapters(model)
    assert_same_tensors(state(model), state(expected))
    assert type(model.two).__mro__[1] is LoRAOwn
    ll.remove_adapters(model)
    ll.remove_adapters(expected)
    assert_same_tensors(state(model), state(expected))


@pytest.fixture
def open_to_all() -> Iterator[None]:
    """Let everybody read what this process writes, if it does not say otherwise."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("open_to_all")
def test_only_the_user_can_read_what_is_sent() -> None:
    module = as_merged(LitTiny())
    home: Any = SimpleNamespace(
        lightning_module=module, state=SimpleNamespace(fn="fit")
    )
    entry = returned_records._send(None, lambda *_: {}, home)
    (name,) = entry.values()
    folder = Path(name)
    assert folder.stat().st_mode & 0o777 == 0o700
    returned_records._receive(None, lambda *_: None, home, entry)


def refuses_folders(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    def refuse(*_: Any, prefix: str = "", **__: Any) -> str:
        if prefix:  # Lightning's own has none
            raise OSError(errno.EROFS, "Read-only file system")
        return str(folder)

    monkeypatch.setattr("tempfile.mkdtemp", refuse)


def has_a_local_class(monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    class Inside(LoRALayer):
        lora_is_linear = True

    monkeypatch.setitem(ADAPTERS, nn.Linear, Inside)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("make", "says"),
    [
        (refuses_folders, "Read-only file system"),
        (has_a_local_class, "local object .*Inside"),
    ],
)
def test_a_fit_whose_record_cannot_be_sent_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Any, says: str
) -> None:
    said = tmp_path / "said.txt"

    def say(message: Any, *_: Any, **__: Any) -> None:
        said.write_text(str(message))

    make(monkeypatch, tmp_path)
    model = LitTiny()
    with warnings.catch_warnings():
        warnings.simplefilter("always", ll.LoRAWarning)
        monkeypatch.setattr(warnings, "showwarning", say)  # in another process
        t = trainer(
            tmp_path,
            [lora()],
            strategy="ddp_fork",
            devices=2,
            enable_checkpointing=False,
            max_epochs=1,
        )
        t.fit(model, data())
    assert is_plain(model)
    assert not torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)
    assert re.search(rf"The fit is complete.*{says}", said.read_text())
    with pytest.raises(ll.AdapterStateError, match="has no adapters"):
        ll.unmerge_adapters(model)

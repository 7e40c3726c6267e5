"""The record of a fit in other processes comes to the main process whole, or the warning says what is lost."""

import copy
import errno
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.errors import LoRAWarning
from lightning_lora.layers import ADAPTERS, LoRALayer, register_adapter
from lightning_lora.model.record import forget_record
from lightning_lora.training import merging
from tests.support.cases import Three
from tests.support.layers import Experts
from tests.support.models import LitTiny, data, is_plain, lora, randomise, same, state, trainer


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder, in which nothing is left in the end."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    yield tmp_path / "temporary"
    assert not list((tmp_path / "temporary").rglob("lightning_lora*"))


def in_fit(home: nn.Module) -> Any:
    return SimpleNamespace(lightning_module=home, state=SimpleNamespace(fn="fit"))


def sent(home: nn.Module) -> dict[str, str]:
    return merging._send(None, lambda *_: {}, in_fit(home))


def receive(home: nn.Module, results: dict[str, str]) -> None:
    merging._receive(None, lambda *_: None, in_fit(home), results)


def merged(model: nn.Module, **config: Any) -> nn.Module:
    """Adapt and merge a model, and return it as it was adapted."""
    ll.inject_adapters(model, ll.LoRAConfig(**({"r": 2} | config)))
    randomise(model)
    adapted = copy.deepcopy(model)
    ll.merge_adapters(model)
    return adapted


def bring_back(home: nn.Module) -> None:
    """As a fit in other processes does: the model gets the merged weights, and the record anew."""
    entry = sent(home)
    forget_record(home)
    receive(home, entry)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "layers": (Three, {"target_modules": "all", "use_dora": True}),
    "slices": (LitTiny, {"target_modules": ["q_proj"], "target_slices": {"q_proj": {"a": [0, 4]}}}),
    "parameters": (lambda: nn.Sequential(Experts(), nn.Linear(4, 4)), {"target_parameters": ["stack"]}),
    "attention": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2), nn.LSTM(8, 8)), {"target_modules": "all"}),
    "buffers": (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), {"modules_to_save": ["1"], "bias": "all"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_adapter_comes_back(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # as users set it who want torch to read safely
    build, config = CASES[case]
    home = build()
    adapted = merged(home, **config)
    bring_back(home)
    ll.unmerge_adapters(home)
    assert same(state(home), state(adapted))
    ll.remove_adapters(home)
    ll.remove_adapters(adapted)
    assert same(state(home), state(adapted))


def test_only_the_user_can_read_what_is_sent() -> None:
    home = LitTiny()
    merged(home)
    before = os.umask(0)
    try:
        entry = sent(home)
    finally:
        os.umask(before)
    (folder,) = map(Path, entry.values())
    assert folder.stat().st_mode & 0o777 == 0o700
    receive(home, entry)


class Own(nn.Linear):
    pass


class LoRAOwn(LoRALayer):
    lora_is_linear = True


def test_an_adapter_class_of_the_user_comes_back_or_the_warning_says_that_it_cannot(monkeypatch: Any) -> None:
    class Inside(LoRALayer):
        lora_is_linear = True

    for kind in (LoRAOwn, Inside):
        monkeypatch.setitem(ADAPTERS, Own, kind)
        register_adapter(Own, kind)
        home = nn.Sequential(Own(4, 4))
        adapted = merged(home)
        if kind is LoRAOwn:
            bring_back(home)
            ll.unmerge_adapters(home)
            assert same(state(home), state(adapted))
        else:
            with pytest.warns(LoRAWarning, match=r"not the adapters and the base .*local object .*Inside"):
                assert sent(home) == {}


@pytest.mark.processes
def test_a_fit_without_a_temporary_folder_says_what_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, prefix: str = "", **__: Any) -> str:
        if prefix:  # Lightning's own has none
            raise OSError(errno.EROFS, "Read-only file system")
        return str(tmp_path)

    def say(message: Any, *_: Any, **__: Any) -> None:
        (tmp_path / "said.txt").write_text(str(message))

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    model, base = LitTiny(), LitTiny()
    with warnings.catch_warnings():
        warnings.simplefilter("always", LoRAWarning)
        monkeypatch.setattr(warnings, "showwarning", say)  # in another process
        options = {"strategy": "ddp_fork", "devices": 2, "enable_checkpointing": False, "max_epochs": 1}
        trainer(tmp_path, [lora()], **options).fit(model, data())
    assert is_plain(model) and not torch.equal(model.q_proj.weight, base.q_proj.weight)
    assert "The fit is complete" in (tmp_path / "said.txt").read_text()
    with pytest.raises(ll.AdapterStateError, match="has no adapters"):
        ll.unmerge_adapters(model)

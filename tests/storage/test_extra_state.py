"""What modules keep besides tensors (``get_extra_state``) is no part of the adapters, unless training changed it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.cases import held
from tests.support.fits import fit
from tests.support.models import ADAPTERS, LitTiny, X, lora


class Keeps(nn.Module):  # a metric, perhaps: it counts, and keeps anything
    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.kept = kept
        self.count = 0

    def get_extra_state(self) -> Any:
        return self.kept(self.count)

    def set_extra_state(self, state: Any) -> None:
        self.state = state


KINDS: dict[str, Any] = {
    "tensors": lambda count: {"sums": [torch.full((2,), count)], "none": None},
    "tensor": lambda count: torch.arange(count + 1),  # of another size each time
    "array": lambda count: {"values": np.full(3, count)},
}


class Counts(LitTiny):
    def __init__(self, kind: str, by: int) -> None:
        super().__init__()
        self.metric = Keeps(KINDS[kind])
        self.by = by

    def training_step(self, *args: Any) -> Tensor:
        self.metric.count += self.by
        return super().training_step(*args)


def assert_computes_as(path: Path, again: LitTiny, model: LitTiny) -> LitTiny:
    """Expect what a file makes of a new module to compute the same, and return it."""
    ll.load_adapter(again, path)
    torch.testing.assert_close(again(X), model(X))
    return again


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_module_kept_before_training_is_in_no_file_of_adapters(
    tmp_path: Path, kind: str
) -> None:
    model, _ = fit(tmp_path, ll.LoRACallback(r=2), model=Counts(kind, 0))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    assert "metric._extra_state" not in load_file(tmp_path / "a.safetensors")
    ll.export_peft(model, tmp_path / "peft")
    assert_computes_as(tmp_path / "a.safetensors", Counts(kind, 0), model)
    assert_computes_as(tmp_path / "peft", Counts(kind, 0), model)


@pytest.mark.parametrize("kind", ["tensors", "tensor"])
def test_what_training_changed_is_in_a_trainers_file(tmp_path: Path, kind: str) -> None:
    model, t = fit(tmp_path, lora(), model=Counts(kind, 1))
    t.save_checkpoint(tmp_path / "a.ckpt")
    stored = held(torch.load(tmp_path / "a.ckpt", weights_only=True))
    after_training = repr(KINDS[kind](8))
    assert repr(stored["metric._extra_state"]) == after_training
    with pytest.raises(ll.ExportError, match=r"metric\._extra_state"):
        ll.export_peft(model, tmp_path / "peft")
    again = assert_computes_as(tmp_path / "a.ckpt", Counts(kind, 1), model)
    assert repr(again.metric.state) == after_training
    again = Counts(kind, 1)
    ll.inject_adapters(again, lora().config)
    ll.load_adapter_state_dict(again, ll.adapter_state_dict(model))
    assert repr(again.metric.state) == after_training
    torch.testing.assert_close(again(X), model(X))


def test_a_tensor_that_training_changed_is_in_an_adapter_file(tmp_path: Path) -> None:
    model, _ = fit(tmp_path, lora(), model=Counts("tensor", 1))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    again = assert_computes_as(tmp_path / "a.safetensors", Counts("tensor", 1), model)
    assert repr(again.metric.state) == repr(KINDS["tensor"](8))


def test_other_objects_that_training_changed_are_named_where_they_have_no_place(
    tmp_path: Path,
) -> None:
    model, _ = fit(tmp_path, lora(), model=Counts("tensors", 1))
    with pytest.warns(
        ll.LoRAWarning, match=r"'metric._extra_state' of Counts changed .*A Trainer's"
    ):
        ll.save_adapter(model, tmp_path / "a.safetensors")
    again = assert_computes_as(tmp_path / "a.safetensors", Counts("tensors", 1), model)
    assert not hasattr(again.metric, "state")


def test_a_run_goes_on_with_a_state_of_another_size(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    _, t = fit(tmp_path, lora(), model=Counts("tensor", 1))
    t.save_checkpoint(file)
    again = Counts("tensor", 1)
    fit(tmp_path, lora(), model=again, ckpt_path=file, max_epochs=3)
    assert len(again.metric.state) == 9


def none_at_first(count: int) -> int | None:
    return count or None


class KeepsTwo(LitTiny):
    """A module with two parts that keep nothing yet."""

    def __init__(self) -> None:
        super().__init__()
        self.one = Keeps(none_at_first)
        self.other = Keeps(none_at_first)


def test_modules_that_keep_nothing_yet_share_nothing() -> None:
    model = KeepsTwo()
    again = KeepsTwo()
    ll.inject_adapters(model, lora().config)
    ll.inject_adapters(again, lora().config)
    model.one.count = 1
    ll.load_adapter_state_dict(again, ll.adapter_state_dict(model))
    assert again.one.state == 1
    assert again.other.state is None


def test_what_cannot_be_asked_for_yet_stops_nothing(tmp_path: Path) -> None:
    model = LitTiny()
    model.metric = Keeps(lambda count: {"share": 1 / count})
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    model.metric.count = 1
    with pytest.warns(ll.LoRAWarning, match="'metric._extra_state' of LitTiny"):
        ll.save_adapter(model, tmp_path / "a.safetensors")
    assert set(ADAPTERS) <= set(load_file(tmp_path / "a.safetensors"))

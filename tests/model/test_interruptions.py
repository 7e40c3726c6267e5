"""A call that fails anywhere leaves the model as it was."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_lora as ll
from tests.support.models import TinyLM, as_merged, randomise, same, state


class Model(nn.Module):
    """Layers of one weight and of several, a tied weight, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.rnn, self.norm = nn.Embedding(7, 6), nn.LSTM(6, 6, batch_first=True), nn.BatchNorm1d(6)
        self.proj, self.head = nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embed.weight
        self.extra = nn.Linear(7, 3)
        self.norm.weight.requires_grad_(False)

    def forward(self, index: Tensor) -> Any:
        x, _ = self.rnn(self.embed(index))
        return self.extra(self.head(self.norm(self.proj(x).mT).mT))


CONFIG = ll.LoRAConfig(r=2, target_modules=["rnn", "proj", "head"], modules_to_save=["extra"], bias="lora_only")
MORE = replace(CONFIG, target_modules=["embed", "rnn", "proj", "head"])
INDEX = torch.arange(7).view(1, 7)


class FailsAt(TorchFunctionMode):
    """Let one call of torch fail, or be interrupted: its place in the order of calls."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.left = place
        self.error = MemoryError("no memory is left") if place % 2 else KeyboardInterrupt()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in ("requires_grad_", "is_inference") and not name.startswith("_"):  # these compute nothing
            self.left -= 1
            if self.left == 0:
                raise self.error
        return func(*args, **(kwargs or {}))


def build(*, merged: bool) -> Model:
    model = Model()
    ll.inject_adapters(model, CONFIG)
    randomise(model)
    with torch.no_grad():
        model.extra.weight.add_(1)
    if merged:
        ll.merge_adapters(model)
    return model.eval()


def described(model: nn.Module) -> Any:
    """All that must not change."""
    kinds = [type(module) for module in model.modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    return kinds, flags


@pytest.fixture
def file(tmp_path: Path) -> Path:
    other = build(merged=False)
    randomise(other, seed=8)
    ll.save_adapter(other, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


CALLS: dict[str, tuple[bool, Callable[[nn.Module, Path], Any]]] = {
    "merge": (False, lambda model, _: ll.merge_adapters(model)),
    "unmerge": (True, lambda model, _: ll.unmerge_adapters(model)),
    "remove": (False, lambda model, _: ll.remove_adapters(model)),
    "load": (False, lambda model, file: ll.load_adapter(model, file)),
    "load merged": (True, lambda model, file: ll.load_adapter(model, file)),
    "inject merged": (True, lambda model, _: ll.inject_adapters(model, CONFIG)),
    "inject more": (False, lambda model, _: ll.inject_adapters(model, MORE)),
    "disable": (False, lambda model, _: ll.disable_adapters(model).__enter__()),
    "disable merged": (True, lambda model, _: ll.disable_adapters(model).__enter__()),
}


@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_fails_anywhere_leaves_the_model_as_it_was(name: str, file: Path) -> None:
    merged, call = CALLS[name]
    whole = build(merged=merged)
    before, output, about, stored = state(whole), whole(INDEX), described(whole), ll.adapter_state_dict(whole)
    for place in itertools.count(1, 5):
        model = copy.deepcopy(whole)
        try:
            with FailsAt(place) as mode:
                call(model, file)
        except (MemoryError, KeyboardInterrupt, RuntimeError, ll.LoRAError):  # torch and we may wrap it
            assert same(state(model), before) and described(model) == about
            assert torch.equal(model(INDEX), output)
            assert same(ll.adapter_state_dict(model), stored)
            continue
        assert mode.left > 0  # it had fewer calls than that
        break
    assert place > 10


@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_a_merge_that_fails_after_its_last_weight_counts_no_update_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(merged=False)
    before, output = state(model), model(INDEX)
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", fails_always)
    with pytest.raises(RuntimeError, match="no memory"):
        ll.merge_adapters(model)
    monkeypatch.undo()
    assert same(state(model), before) and torch.equal(model(INDEX), output)
    ll.merge_adapters(model)
    torch.testing.assert_close(model(INDEX), output)
    ll.unmerge_adapters(model)
    assert same(state(model), before)


def fails_always(*_: Any) -> None:
    raise RuntimeError("no memory is left")


@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_a_converted_model_that_fails_to_unmerge_keeps_its_exact_base_and_adapters() -> None:
    whole = TinyLM()
    targets = ["q_proj", "embed", "lm_head"]  # both uses of the tied weight
    as_merged(whole, target_modules=targets, autocast_adapter_dtype=False)
    whole.bfloat16()
    expected = copy.deepcopy(whole)
    ll.unmerge_adapters(expected)
    for place in itertools.count(1):
        model = copy.deepcopy(whole)
        try:
            with FailsAt(place):
                ll.unmerge_adapters(model)
        except (MemoryError, KeyboardInterrupt):
            ll.unmerge_adapters(model)  # they were not rounded to the other dtype on the way
            assert same(state(model), state(expected))
            continue
        break
    assert place > 30

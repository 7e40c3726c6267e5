"""A copy of a merged model is un-merged exactly, or refused if it changed."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import AdapterStateError, merge_adapters, unmerge_adapters
from tests.support.models import as_trained, same, state, unties

CHANGED = "changed since its adapters were merged"


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch": through_torch,
}


class Model(nn.Module):
    """Layers of many kinds, with weights larger than a quick look."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 50), nn.Linear(50, 60, bias=False)
        self.head.weight = self.embed.weight
        self.q, self.rnn, self.other = nn.Linear(50, 50), nn.LSTM(50, 50), nn.Linear(50, 60)
        self.again = self.q


def merged() -> tuple[Model, dict[str, Tensor]]:
    """A merged model, and its state before."""
    model = as_trained(Model(), target_modules=["head", "q", "rnn"], modules_to_save=["other"])
    before = state(model)
    merge_adapters(model)
    return model, before


def write(model: nn.Module, name: str, amount: float = 1.0) -> None:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] += amount  # between the samples of a quick look


def replace(model: nn.Module, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    changed = model.get_parameter(name).detach().clone()
    changed.view(-1)[1] += 1
    setattr(model.get_submodule(owner), leaf, nn.Parameter(changed))


def set_data(model: nn.Module, name: str) -> None:
    changed = model.get_parameter(name).detach().clone()
    changed.view(-1)[1] += 1
    model.get_parameter(name).data = changed


NAMES = ("q.weight", "head.weight", "embed.weight", "rnn.weight_hh_l0", "q.bias", "other.weight")
each_copy = pytest.mark.parametrize("kind", COPIES)


@unties
@each_copy
@pytest.mark.parametrize("change", [write, replace, set_data])
@pytest.mark.parametrize("name", NAMES)
def test_a_change_before_or_after_a_copy_is_refused(name: str, change: Callable[..., None], kind: str) -> None:
    for times in ((True, False), (False, True), (True, True)):
        model, _ = merged()
        for now in times:
            if now:
                change(model, name)
            model = COPIES[kind](model)
        before = state(model)
        with pytest.raises(AdapterStateError, match=CHANGED):
            unmerge_adapters(model)
        assert same(state(model), before)


@unties
def test_copies_of_copies_are_unmerged_exactly_with_the_same_values_in_other_memory() -> None:
    def moves(model: Model) -> Model:
        for p in model.parameters():
            p.data = p.data.clone()
        return model

    def loads(model: Model) -> Model:
        model.load_state_dict(state(model))
        return model

    for steps in itertools.product([*COPIES.values(), moves, loads], repeat=2):
        model, before = merged()
        for step in steps:
            model = step(model)
        unmerge_adapters(model)
        assert same(state(model), before) and model.head.weight is model.embed.weight and model.again is model.q


@unties
@each_copy
def test_a_change_that_is_taken_back_around_a_copy_is_none(kind: str) -> None:
    model, before = merged()
    with torch.no_grad():
        kept = model.q.weight.detach().clone()
        model.q.weight.mul_(2)
        model = COPIES[kind](model)
        model.q.weight.copy_(kept)
    unmerge_adapters(model)
    assert same(state(model), before)

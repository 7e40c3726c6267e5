"""What no adapter trains is named, unless that is usual."""

import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters
from lightning_lora.model.leftovers import left_alone, left_trainable
from lightning_lora.model.view import View
from tests.support.models import TinyLM


class Pair(nn.Module):
    """A large body, and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32))
        self.neck = nn.Sequential(nn.Linear(32, 8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.ones(4))


def test_what_the_user_left_trainable_is_named_by_its_largest_modules() -> None:
    def left(*, targets: list[str], saved: list[str] | None = None, thawed: tuple[str, ...] = ()) -> list[str]:
        model = Pair()
        model.body.requires_grad_(False)
        for name in thawed:
            model.get_submodule(name).requires_grad_(True)
        inject_adapters(model, LoRAConfig(r=2, target_modules=targets, modules_to_save=saved))
        return left_trainable(View(model))

    assert left(targets=["body.0"]) == ["scale", "neck", "head"]
    assert left(targets=["body.0"], saved=["head", "scale"]) == ["neck"]
    assert left(targets=["body.0", "neck.0", "head"], saved=["scale"]) == []  # the norm is beside an adapter
    assert left(targets=["body.0"], saved=["neck", "head", "scale"], thawed=("body.1",)) == ["body.1"]


def test_a_model_of_which_nothing_little_or_all_is_frozen_has_nothing_left() -> None:
    for frozen in ([], ["head"], [""]):
        model = Pair()
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        inject_adapters(model, LoRAConfig(r=2, target_modules=["body.0"]))
        assert left_trainable(View(model)) == []


def test_convolutions_that_linear_targets_leave_alone_are_counted() -> None:
    def share(**options: object) -> float:
        model = nn.Sequential(nn.Conv1d(32, 32, 3), nn.Linear(32, 32), nn.Embedding(500, 32), nn.LSTM(32, 8))
        model[3].requires_grad_(False)
        inject_adapters(model, LoRAConfig(r=2, **options))  # type: ignore[arg-type]
        alone = left_alone(View(model))
        assert alone.layers == (["0"] if alone.share else []) and alone.kinds == (["Conv1d"] if alone.share else [])
        return alone.share

    assert 0.1 < share() < 0.2
    assert share(target_modules="all") == share(target_modules=["1"]) == 0  # the user has chosen
    assert share(exclude_modules=["0"]) == share(modules_to_save=["0"]) == 0


def test_embeddings_and_heads_of_language_models_are_not_counted() -> None:
    model = TinyLM()
    inject_adapters(model, LoRAConfig(r=2))
    assert left_alone(View(model)) == ([], [], 0)

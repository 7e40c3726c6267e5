"""Frozen weights that look untrained are noted for files when a fit begins, and until its adapters learn."""

from pathlib import Path
from typing import Any

import pytest

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters
from lightning_lora.model.view import view_of
from lightning_lora.moments import Guards
from lightning_lora.training.untrained_at_start import tell_of_new_base, tell_of_start
from tests.support.messages import warned_by
from tests.support.models import LitTiny, aged, data, randomise, trainer

HEAD = ("head.weight", "head.bias")
SILENT = Guards([])


@pytest.fixture
def model() -> Any:
    """A module with fresh adapters, whose weights look trained."""
    model = LitTiny(64)
    for layer in (model.embed, model.q_proj, model.v_proj, model.head):
        aged(layer)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    return model


def begun(model: Any) -> Any:
    """The names that are noted once a fit of this module has begun."""
    view = view_of(model)
    tell_of_start(view, SILENT)
    return view.adapter.of_no_base


def test_a_new_head_is_noted_when_a_fit_begins(model: Any) -> None:
    assert begun(model) == ()
    model.head.reset_parameters()
    view_of(model).adapter.of_no_base = None
    assert begun(model) == HEAD


def test_names_that_a_file_gave_are_kept(model: Any) -> None:
    model.head.reset_parameters()
    view_of(model).adapter.of_no_base = ("head.bias",)
    assert begun(model) == ("head.bias",)


def test_adapters_that_have_learned_are_not_asked_when_a_fit_begins(model: Any) -> None:
    model.head.reset_parameters()
    randomise(model)
    assert begun(model) is None


def test_a_head_that_a_hook_makes_new_is_noted_while_nothing_has_learned(
    model: Any,
) -> None:
    begun(model)
    model.head.reset_parameters()
    tell_of_new_base(model, SILENT, ["head.weight"])
    assert view_of(model).adapter.of_no_base == HEAD


def test_a_head_that_is_made_new_beside_trained_adapters_is_not_noted(
    model: Any,
) -> None:
    begun(model)
    randomise(model)
    model.head.reset_parameters()
    tell_of_new_base(model, SILENT, ["head.weight"])
    assert view_of(model).adapter.of_no_base == ()


class Resets(LitTiny):
    """It resets its head before the first batch."""

    def on_train_epoch_start(self) -> None:
        self.head.reset_parameters()


def test_a_head_that_is_reset_before_the_first_batch_is_noted(tmp_path: Path) -> None:
    model = Resets(64)
    aged(model)
    callback = LoRACallback(r=2, target_modules=["q_proj", "v_proj"], merge=False)
    run = trainer(tmp_path, [callback], max_epochs=1)
    warned_by(run.fit, model, data())
    assert view_of(model).adapter.of_no_base == HEAD

"""After a stage, nothing of this package keeps the module or the Trainer in memory."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.tuner import Tuner

from lightning_lora import LoRAMonitor, inject_adapters
from tests.support.cases import StopError
from tests.support.models import LitTiny, data, lora, trainer


class Fails(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise StopError


class NotesItsOptimizer(LitTiny):
    """Notes it on each of its weights."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        for p in self.parameters():
            p.notes = (self, optimizer)  # type: ignore[attr-defined]
        return optimizer


def fit(model: LitTiny, t: L.Trainer) -> None:
    t.fit(model, data(), data())


def fit_an_adapted_one(model: LitTiny, t: L.Trainer) -> None:
    inject_adapters(model, lora().config)
    fit(model, t)


def fail(model: LitTiny, t: L.Trainer) -> None:
    t.callbacks.append(Fails())  # type: ignore[attr-defined]
    with pytest.raises(StopError):
        fit(model, t)


def evaluate(model: LitTiny, t: L.Trainer) -> None:
    t.test(model, data(), verbose=False)


def evaluate_after_a_fit(model: LitTiny, t: L.Trainer) -> None:
    fit(model, t)
    evaluate(model, t)


def tune(model: LitTiny, t: L.Trainer) -> None:
    model.lr = 0.05  # type: ignore[assignment]
    Tuner(t).lr_find(model, data(), num_training=3)


def assert_nothing_remains(
    run: Callable[[LitTiny, L.Trainer], None],
    folder: Path,
    *callbacks: L.Callback,
    kind: type[LitTiny] = LitTiny,
) -> None:
    """Neither the module nor the Trainer of a run is in memory after it."""
    model = kind()
    t = trainer(folder, callbacks, max_epochs=1)
    run(model, t)
    weak_model = weakref.ref(model)
    weak_trainer = weakref.ref(t)
    del model, t
    gc.collect()
    assert weak_model() is None
    assert weak_trainer() is None


RUNS = [fit, fit_an_adapted_one, fail, evaluate, evaluate_after_a_fit, tune]


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("merge", ["last", False])
def test_a_callback_in_a_variable_keeps_neither_module_nor_trainer(
    tmp_path: Path, run: Any, merge: Any
) -> None:
    callbacks: list[L.Callback] = [lora(merge=merge)]
    if run is fit:
        callbacks.append(LoRAMonitor())
    assert_nothing_remains(run, tmp_path, *callbacks)
    assert_nothing_remains(fit, tmp_path, *callbacks)  # it serves again


@pytest.mark.parametrize("lr_scale", [1, 10])
def test_nothing_of_the_process_keeps_a_module_whose_weights_note_its_optimizer(
    tmp_path: Path, lr_scale: Any
) -> None:
    assert_nothing_remains(
        fit, tmp_path, lora(lr_scale=lr_scale), kind=NotesItsOptimizer
    )

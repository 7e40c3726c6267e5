"""What a module notes of its weights outside of its layers is named, if adapters make it useless or files large."""

import re
from ast import literal_eval
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_lora as ll
from tests.guards.test_advice import fit
from tests.support.models import LitTiny, data, trainer
from tests.support.parameters import trainable_names, values_of


class Keeps(LitTiny):
    """It has a hyperparameter."""

    def __init__(self, pretrained: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_weights_among_the_hyperparameters_are_named_and_what_is_said_works(
    tmp_path: Path,
) -> None:
    weights = {"net": [LitTiny(128), LitTiny(128).state_dict()]}
    (said,) = fit(tmp_path, Keeps(weights), r=2, exclude_modules=["head"])
    assert (
        "Hyperparameters of Keeps hold weights: 'pretrained' (0.3 MB). Every "
        "checkpoint stores them" in said
    )
    (listed,) = re.findall(r"ignore=(\[.*?\])", said)
    model = Keeps(weights)
    for name in literal_eval(listed):
        del model.hparams[name]
    assert fit(tmp_path, model, r=2, exclude_modules=["head"]) == []


def test_other_tensors_among_the_hyperparameters_are_not_named(tmp_path: Path) -> None:
    model = Keeps({"seed": torch.ones(3), "rate": 0.1})
    assert fit(tmp_path, model, r=2, exclude_modules=["head"]) == []


class Averages(LitTiny):
    """An average by the names of its weights in a dict, as many write it.

    It begins in training, if not before.
    """

    average: Any = None

    def values(self) -> dict[str, Tensor]:
        return self.average

    def keep(self, values: dict[str, Tensor]) -> None:
        self.average = values

    def begin(self) -> None:
        now = values_of(self)
        self.keep({name: now[name] for name in trainable_names(self)})

    def on_train_start(self) -> None:
        if self.average is None:
            self.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        now = values_of(self)
        for name, value in self.values().items():
            value.lerp_(now[name], 0.5)


class InAClass(Averages):
    """The same, in an object of a class."""

    def values(self) -> dict[str, Tensor]:
        return self.average.shadow

    def keep(self, values: dict[str, Tensor]) -> None:
        self.average = SimpleNamespace(shadow=values)


@pytest.mark.parametrize(
    ("kind", "place"), [(Averages, "average"), (InAClass, "average.shadow")]
)
def test_an_average_by_the_names_of_frozen_weights_is_named(
    tmp_path: Path, kind: Any, place: str
) -> None:
    early = kind()
    early.begin()
    (said,) = fit(tmp_path, early, r=2, exclude_modules=["head"])
    assert (
        f"{kind.__name__}.{place} is a dict of tensors with the names of weights, "
        "which are frozen" in said
    )
    late = kind()
    assert fit(tmp_path, late, r=2, exclude_modules=["head"]) == []
    assert late.values()["q_proj.lora_B"].any()


def test_other_dicts_of_tensors_are_not_named(tmp_path: Path) -> None:
    model: Any = LitTiny()
    model.features = {"q_proj": torch.ones(3), "v_proj": torch.ones(3)}
    # which trains in full
    model.classes = {"head.weight": torch.ones(4, 8), "head.bias": torch.ones(4)}
    t = trainer(
        tmp_path, [ll.LoRACallback(r=2, modules_to_save=["head"])], max_epochs=1
    )
    t.fit(model, data())  # a warning would be an error

"""What a module notes of its weights outside of its layers is named, if adapters make it useless or files large."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_lora as ll
from tests.support.models import LitTiny, data, trainer
from tests.training.test_advice import fit


class Keeps(LitTiny):
    """It has a hyperparameter."""

    def __init__(self, pretrained: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_weights_among_the_hyperparameters_are_named_and_what_is_said_works(tmp_path: Path) -> None:
    weights = {"net": [LitTiny(128), LitTiny(128).state_dict()]}
    (said,) = fit(tmp_path, Keeps(weights), r=2, exclude_modules=["head"])
    assert "Hyperparameters of Keeps hold weights: 'pretrained' (0.3 MB). Every checkpoint stores them" in said
    (listed,) = re.findall(r"ignore=(\[.*?\])", said)
    model = Keeps(weights)
    for name in eval(listed):
        del model.hparams[name]
    assert fit(tmp_path, model, r=2, exclude_modules=["head"]) == []
    assert fit(tmp_path, Keeps({"seed": torch.ones(3), "rate": 0.1}), r=2, exclude_modules=["head"]) == []


class Averages(LitTiny):
    """An average by the names of its weights, as many write it: in a dict, or in an object of a class."""

    def __init__(self, *, in_class: bool, late: bool = False) -> None:
        super().__init__()
        self.in_class = in_class
        if not late:
            self.begin()

    def begin(self) -> None:
        values = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}
        if self.in_class:
            self.average = type("EMA", (), {})()
            self.average.shadow = values
        else:
            self.average = values

    def on_train_start(self) -> None:
        if not hasattr(self, "average"):
            self.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        now = dict(self.named_parameters())
        values: dict[str, Tensor] = self.average.shadow if self.in_class else self.average
        for name, value in values.items():
            value.lerp_(now[name].detach(), 0.5)


@pytest.mark.parametrize(("in_class", "place"), [(False, "average"), (True, "average.shadow")])
def test_an_average_by_the_names_of_frozen_weights_is_named(tmp_path: Path, in_class: bool, place: str) -> None:
    (said,) = fit(tmp_path, Averages(in_class=in_class), r=2, exclude_modules=["head"])
    assert f"Averages.{place} is a dict of tensors with the names of weights, which are frozen" in said
    model = Averages(in_class=in_class, late=True)
    assert fit(tmp_path, model, r=2, exclude_modules=["head"]) == []
    values: dict[str, Tensor] = model.average.shadow if in_class else model.average
    assert values["q_proj.lora_B"].any()


def test_other_dicts_of_tensors_are_not_named(tmp_path: Path) -> None:
    model: Any = LitTiny()
    model.features = {"q_proj": torch.ones(3), "v_proj": torch.ones(3)}
    model.classes = {"head.weight": torch.ones(4, 8), "head.bias": torch.ones(4)}  # which trains in full
    t = trainer(tmp_path, [ll.LoRACallback(r=2, modules_to_save=["head"])], max_epochs=1)
    t.fit(model, data())  # a warning would be an error

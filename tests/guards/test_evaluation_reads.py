"""Adapted weights that only an evaluation reads by hand are named: it does not compute what was trained."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.guards.read_by_hand.reads import ReadByHand
from tests.guards.test_reads import (
    CallsNoLayer,
    Kinds,
    Transposed,
    left_behind,
    of_a_norm,
    with_its_update,
)
from tests.support.cases import StopError
from tests.support.compared import assert_same_tensors
from tests.support.messages import lines_with, messages_of, warned_by
from tests.support.models import WIDTH, LitTiny, data, trainer

READS = "reads the weight"


class Fused(LitTiny):
    """In eval mode, it computes two layers as one: past their adapters."""

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        if self.training:
            return self.head(torch.tanh(self.q_proj(x)) + self.v_proj(x))
        fused = torch.cat([self.q_proj.weight, self.v_proj.weight])
        q, v = F.linear(x, fused).chunk(2, dim=-1)
        return self.head(torch.tanh(q + self.q_proj.bias) + v)


def said(call: Callable[..., object], *args: Any) -> list[str]:
    """What a call says of reads."""
    return lines_with(READS, messages_of(warned_by(call, *args)))


def callback(**options: Any) -> ll.LoRACallback:
    defaults = {"r": 2, "target_modules": "all", "merge": False}
    return ll.LoRACallback(**(defaults | options))


def test_a_validation_that_reads_past_the_adapters_is_named_once(
    tmp_path: Path,
) -> None:
    fit = trainer(tmp_path, [callback()], max_epochs=3).fit
    (message,) = said(fit, Fused(), data(), data())
    assert "A validation step reads the weight of 'q_proj', 'v_proj'" in message
    assert "modules_to_save=[" in message
    assert "exclude_modules=[" in message


@pytest.mark.parametrize("advice", ["modules_to_save", "exclude_modules"])
def test_what_the_message_says_ends_it(tmp_path: Path, advice: str) -> None:
    options = {advice: ["q_proj", "v_proj"]}
    fit = trainer(tmp_path, [callback(**options)]).fit
    assert said(fit, Fused(), data(), data()) == []


@pytest.mark.parametrize(
    ("method", "step"),
    [
        ("validate", "validation step"),
        ("test", "test step"),
        ("predict", "prediction step"),
    ],
)
def test_every_evaluation_of_a_trained_model_is_looked_at(
    tmp_path: Path, method: str, step: str
) -> None:
    model = Fused()
    trainer(tmp_path, [callback()], max_epochs=1).fit(model, data())
    evaluate = getattr(trainer(tmp_path, [callback()]), method)
    (message,) = said(evaluate, model, data())
    assert f"A {step} reads" in message


def test_a_merged_model_is_not_named(tmp_path: Path) -> None:
    model = Fused()
    trainer(tmp_path, [callback(merge="last")], max_epochs=1).fit(model, data())
    assert said(trainer(tmp_path, [callback()]).test, model, data()) == []


def test_what_a_training_step_reads_too_is_named_once(tmp_path: Path) -> None:
    fit = trainer(tmp_path, [callback()]).fit
    (message,) = said(fit, Transposed(), data(), data())
    assert "A training step reads the weight of 'embed'" in message


def test_layers_that_no_training_step_calls_have_another_warning(
    tmp_path: Path,
) -> None:
    fit = trainer(tmp_path, [callback(target_modules=["q_proj", "v_proj"])]).fit
    caught = messages_of(warned_by(fit, CallsNoLayer(), data(), data()))
    assert lines_with(READS, caught) == []
    assert lines_with("'q_proj' received no gradient", caught)


# What is no read


class Evaluates(Kinds):
    """It looks at its weights in a validation, which no training step does."""

    def __init__(self, look: Any) -> None:
        super().__init__()
        self.look = look

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if self.look is not None:
            self.look(self)


def logs_a_norm(model: Kinds) -> None:
    model.log("norm", model.q_proj.weight.norm())


def logs_values(model: Kinds) -> None:
    model.conv.weight.detach().cpu().numpy()


def asks_for_the_place(model: Kinds) -> None:
    torch.zeros(2, device=model.q_proj.weight.device, dtype=model.q_proj.weight.dtype)


def copies_a_layer(model: Kinds) -> None:
    copy.deepcopy(model.q_proj)


def compares_with_the_base(model: Kinds) -> None:
    with ll.disable_adapters(model):
        F.linear(torch.ones(WIDTH), model.q_proj.weight)


@pytest.mark.parametrize(
    "look",
    [
        None,
        logs_a_norm,
        logs_values,
        asks_for_the_place,
        copies_a_layer,
        compares_with_the_base,
        with_its_update,
        of_a_norm,
    ],
)
def test_looks_are_no_reads(tmp_path: Path, look: Any) -> None:
    fit = trainer(tmp_path, [callback()], max_epochs=1).fit
    assert said(fit, Evaluates(look), data(), data()) == []


class Encoder(LitTiny):
    """torch's encoder, which has a shortcut for eval mode."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, index: Tensor) -> Tensor:
        x = self.encoder(self.embed(index)[:, None])
        return self.head(x[:, 0])


@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["v_proj", "head"], "use_dora": True}]
)
@pytest.mark.parametrize("kind", [Kinds, Encoder])
def test_layers_and_shortcuts_of_torch_are_no_reads(
    tmp_path: Path, kind: Any, options: Any
) -> None:
    fit = trainer(tmp_path, [callback(**options)], max_epochs=1).fit
    assert said(fit, kind(), data(), data()) == []


# It changes nothing


def test_what_is_watched_has_the_bits_of_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Kinds()
    trainer(tmp_path, [callback()], max_epochs=1).fit(model, data())
    watched = trainer(tmp_path, [callback()]).predict(model, data())
    monkeypatch.delattr(ReadByHand, "first_evaluation_runs")
    unwatched = trainer(tmp_path, [callback()]).predict(model, data())
    assert_same_tensors(dict(enumerate(watched)), dict(enumerate(unwatched)))


class Fails(Kinds):
    """It notes what a look has put on it, and fails."""

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        vars(self)["seen"] = left_behind(self)
        raise StopError


def test_nothing_of_a_look_is_left_by_a_step_that_fails(tmp_path: Path) -> None:
    model = Fails()
    trainer(tmp_path, [callback()], max_epochs=1).fit(model, data())
    with pytest.raises(StopError):
        trainer(tmp_path, [callback()]).predict(model, data())
    assert vars(model)["seen"]
    assert left_behind(model) == []

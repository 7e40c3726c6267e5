"""An evaluation with nothing to load adds nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import BaseMismatchError, LoRACallback, LoRAWarning, inject_adapters, unmerge_adapters
from lightning_lora.model.state import find_record
from tests.support.cases import StopError
from tests.support.fits import fit, outcome
from tests.support.late import BornInConfigureModel, BornInSetup, BuiltAnew
from tests.support.models import LitTiny, data, is_plain, lora, same, state, trainer

STAGES = ["validate", "test", "predict"]


def half_frozen() -> LitTiny:
    model = LitTiny()
    model.q_proj.requires_grad_(False)
    return model


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def looks(model: nn.Module) -> list[Any]:
    """All that one sees of a model."""
    hooks = [model._load_state_dict_pre_hooks, model._state_dict_hooks, model._forward_hooks]
    return [[type(module) for module in model.modules()], flags(model), [len(each) for each in hooks]]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("trial", [False, 1])
def test_a_plain_model_stays_plain(tmp_path: Path, stage: str, trial: Any) -> None:
    model, expected = half_frozen(), outcome(trainer(tmp_path, fast_dev_run=trial), stage, LitTiny())
    before, values = looks(model), state(model)
    t = trainer(tmp_path, [lora()], fast_dev_run=trial)
    for _ in range(2):
        assert torch.equal(outcome(t, stage, model), expected)
        assert looks(model) == before and same(state(model), values) and find_record(model) is None


@pytest.mark.parametrize("build", [BornInSetup, BornInConfigureModel, BuiltAnew])
def test_layers_that_are_made_late_stay_plain_too(tmp_path: Path, build: Callable[[], LitTiny]) -> None:
    model, t = build(), trainer(tmp_path, [lora()])
    for stage in STAGES:
        outcome(t, stage, model)
        assert is_plain(model) and find_record(model) is None and all(flags(model).values())
    t.fit(model, data())
    assert is_plain(model) and find_record(model) is not None


def test_targets_are_a_matter_of_fits_and_files(tmp_path: Path) -> None:
    outcome(trainer(tmp_path, [LoRACallback(target_modules=["nowhere"])]), "validate", LitTiny())


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_checkpoint_is_loaded_as_lightning_does(tmp_path: Path, stage: str) -> None:
    other, t = fit(tmp_path, max_epochs=1)
    t.save_checkpoint(tmp_path / "full.ckpt")
    expected = outcome(trainer(tmp_path), stage, other)
    model, t = half_frozen(), trainer(tmp_path, [lora()])
    before = looks(model)
    assert torch.equal(outcome(t, stage, model, ckpt_path=tmp_path / "full.ckpt"), expected)
    assert looks(model) == before and same(state(model), state(other)) and find_record(model) is None


@pytest.mark.parametrize("stage", STAGES)
def test_adapters_come_with_a_file_and_stay(tmp_path: Path, stage: str) -> None:
    other, t = fit(tmp_path, lora(merge=False))
    t.save_checkpoint(tmp_path / "a.ckpt")
    expected, model, t = outcome(trainer(tmp_path), stage, other), LitTiny(), trainer(tmp_path, [lora()])
    plain = outcome(t, stage, model)
    assert is_plain(model) and not torch.equal(plain, expected)
    for options in ({"ckpt_path": tmp_path / "a.ckpt"}, {}):
        assert torch.equal(outcome(t, stage, model, **options), expected)
        assert same(state(model), state(other)) and flags(model) == flags(other)


@pytest.mark.parametrize("part", [False, True])
def test_adapters_that_are_there_are_evaluated(tmp_path: Path, part: bool) -> None:
    class Whole(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"q": self.q_proj})

    model = Whole()
    options = {"target_modules": ["q"], "modules_to_save": None} if part else {}
    inject_adapters(model.body if part else model, lora(**options).config)
    model.q_proj.lora_B.data.fill_(0.1)  # type: ignore[union-attr,operator]
    expected = outcome(trainer(tmp_path), "predict", model)
    assert torch.equal(outcome(trainer(tmp_path, [lora(**options)]), "predict", model), expected)
    assert not is_plain(model)


class Sees(L.Callback):  # looks at the module in each process
    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        assert is_plain(pl_module) and find_record(pl_module) is None and all(flags(pl_module).values())
        assert trainer.world_size == 2


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:.*Using `DistributedSampler`:UserWarning")
def test_every_process_stays_plain(tmp_path: Path) -> None:
    model, t = LitTiny(), trainer(tmp_path, [lora(), Sees()], strategy="ddp_fork", devices=2)
    t.test(model, data(), verbose=False)
    Sees.on_test_end(Sees(), t, model)
    t.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert same(checkpoint["state_dict"], LitTiny().state_dict()) and not [key for key in checkpoint if "lora" in key]


class Fails(LitTiny):  # with a setup of its own, whose test fails
    def setup(self, stage: str) -> None:
        pass

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        raise StopError


def test_a_merged_model_with_other_weights_keeps_its_memory_when_an_evaluation_fails(tmp_path: Path) -> None:
    model, t = fit(tmp_path, lora(), model=Fails())
    t.save_checkpoint(tmp_path / "a.ckpt")
    merged = state(model)
    model.load_state_dict(LitTiny().state_dict())
    with pytest.warns(LoRAWarning, match="new base"), pytest.raises(StopError):
        t.test(model, data())
    assert is_plain(model) and same(state(model), LitTiny().state_dict())
    model.q_proj.weight.data.add_(1)
    with pytest.warns(UserWarning, match="taken as a new base"), pytest.raises(BaseMismatchError):
        t.test(model, data(), ckpt_path=tmp_path / "a.ckpt")
    assert is_plain(model)
    model.load_state_dict(merged)
    unmerge_adapters(model)
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)

"""What a stage leaves of the module: live adapters if they were to stay, and a frozen base whatever was raised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject_adapters
from tests.models import ADAPTERS, WORDS, LitTiny, data, is_plain, lora, state, trainer

X = torch.arange(WORDS)


def test_a_fit_that_merges_nothing_leaves_live_adapters_on_a_module_that_an_earlier_fit_merged(tmp_path: Path) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora()]).fit(model, data())
    assert is_plain(model)
    t = trainer(tmp_path, [lora(merge=False)])
    t.fit(model, data())
    assert set(ADAPTERS) <= set(dict(model.named_parameters()))
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)
    t.test(model, data(), verbose=False)
    assert set(ADAPTERS) <= set(dict(model.named_parameters()))


class MakesNone(LitTiny):
    """A module with a frozen norm, that raises where it should make its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.embed.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        assert self.q_proj.weight.requires_grad and not self.embed.weight.requires_grad  # the base as it was
        raise ZeroDivisionError


def flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_a_base_is_frozen_again_after_an_optimizer_that_could_not_be_made(tmp_path: Path) -> None:
    model = MakesNone()
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["head"]))
    before = flags(model)
    assert not before["q_proj.weight"] and before["head.weight"] and before["q_proj.lora_A"]
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, [lora()]).fit(model, data())
    assert flags(model) == before
    statistics = state(model.norm)
    model.train().norm(torch.ones(4, 8))
    assert all(torch.equal(value, statistics[name]) for name, value in model.norm.state_dict().items())


def test_a_module_that_came_plain_has_its_flags_back_after_an_optimizer_that_could_not_be_made(tmp_path: Path) -> None:
    model = MakesNone()
    before = flags(model)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, [lora()]).fit(model, data())
    assert is_plain(model) and flags(model) == before

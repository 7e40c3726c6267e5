"""Strategies that shard the model in another way are refused by name, before anything changes."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from lightning_lora import LoRAConfig, StrategyError
from lightning_lora.training.deepspeed import LoRADeepSpeedStrategy
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategies import overlay_strategy
from lightning_lora.training.strategy import LoRAStrategy
from tests.support.models import LitTiny, data, is_plain, lora, same, state, trainer


class DeepSpeedStrategy(SingleDeviceStrategy):
    """It has what Lightning's strategy of this name has before a run."""

    restore_checkpoint_after_setup = True  # type: ignore[assignment]

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class Renamed(DeepSpeedStrategy):
    """As in Ray, and in users' code."""


def kind_of(strategy: Any) -> type[LoRAStrategy]:
    return type(overlay_strategy(strategy, Stage(LoRAConfig()))).overlaid[0]


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, Renamed])
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_are_accepted(kind: type[DeepSpeedStrategy], stage: int) -> None:
    offload = {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    assert kind_of(kind({"zero_optimization": {"stage": stage}})) is LoRADeepSpeedStrategy
    assert kind_of(kind({"zero_optimization": offload})) is LoRADeepSpeedStrategy


def test_zero_3_is_refused_before_anything_changes(tmp_path: Path) -> None:
    model, before = LitTiny(), state(LitTiny())
    strategy = Renamed({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    with pytest.raises(
        StrategyError, match=r"(?s)^Renamed with ZeRO stage 3 shards .* ModelParallelStrategy.*fully_sh"
    ):
        trainer(tmp_path, [lora()], strategy=strategy).fit(model, data())
    assert is_plain(model) and same(state(model), before)
    assert type(strategy) is Renamed


@pytest.mark.parametrize("config", [None, {}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}])
def test_deepspeed_without_zero_is_refused(config: Any) -> None:
    with pytest.raises(StrategyError, match=r"DeepSpeedStrategy without ZeRO .* strategy='ddp', or ZeRO stage 1 or 2"):
        kind_of(DeepSpeedStrategy(config))


def test_fsdp1_is_refused_with_what_to_write_instead() -> None:
    with pytest.raises(StrategyError, match=r"(?s)^FSDPStrategy shards .* ModelParallelStrategy.*fully_shard\("):
        kind_of(FSDPStrategy())

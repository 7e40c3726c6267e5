"""Lay our methods over those of a Trainer's strategy. A kind of strategy is one file, and one line here."""

from typing import Any

from lightning_lora.tensors.inplace import class_names
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategies.deepspeed import DeepSpeedMethods
from lightning_lora.training.strategies.overlay import overlaid_methods
from lightning_lora.training.strategies.sharded import ShardedMethods
from lightning_lora.training.strategies.strategy import StrategyMethods

KINDS: dict[str, type[StrategyMethods]] = {
    "DeepSpeedStrategy": DeepSpeedMethods,
    "ModelParallelStrategy": ShardedMethods,
}
"""The methods for strategies of a class with this name, or below it. There are two Lightning packages."""


def overlay_strategy(strategy: Any, stage: Stage) -> StrategyMethods:
    """Lay our methods over those of a strategy, to act in ``stage``."""
    methods = methods_of(strategy)
    if methods is None:
        kind = _kind_of(strategy)
        kind.check(strategy)
        methods = kind(strategy)
    methods.stage = stage
    methods.lay_over()
    return methods


def methods_of(strategy: Any) -> StrategyMethods | None:
    """Return our methods over those of a strategy, if there are any."""
    methods: StrategyMethods | None = overlaid_methods(strategy)
    return methods


def _kind_of(strategy: Any) -> type[StrategyMethods]:
    """The class of our methods for a strategy."""
    for name in class_names(strategy):
        if name in KINDS:
            return KINDS[name]
    return StrategyMethods

"""Patch a Trainer's strategy with our methods.

A kind of strategy is one file, and one line here.
"""

from typing import Any

from lightning_lora.tensors.inplace import class_names
from lightning_lora.training.stages.stage import Stage
from lightning_lora.training.strategies.deepspeed import DeepSpeedMethods
from lightning_lora.training.strategies.sharded import ShardedMethods
from lightning_lora.training.strategies.strategy import StrategyMethods
from lightning_lora.training.strategies.strategy_patch import patch_of

KINDS: dict[str, type[StrategyMethods]] = {
    "DeepSpeedStrategy": DeepSpeedMethods,
    "ModelParallelStrategy": ShardedMethods,
}
"""Our methods for strategies of a class with this name, or a subclass of it.

Both Lightning packages have them.
"""


def patch_strategy(strategy: Any, stage: Stage) -> StrategyMethods:
    """Set our methods on a strategy, to act in ``stage``."""
    methods = methods_of(strategy)
    if methods is None:
        kind = _kind_of(strategy)
        kind.check(strategy)
        methods = kind(strategy)
    methods.stage = stage
    methods.patch()
    return methods


def methods_of(strategy: Any) -> StrategyMethods | None:
    """Return our methods on a strategy, if it has any."""
    methods: StrategyMethods | None = patch_of(strategy)
    return methods


def _kind_of(strategy: Any) -> type[StrategyMethods]:
    """The class of our methods for a strategy."""
    for name in class_names(strategy):
        if name in KINDS:
            return KINDS[name]
    return StrategyMethods

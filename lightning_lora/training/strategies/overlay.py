"""Add our methods to a Trainer's strategy. The file of each kind of strategy registers them."""

from functools import cache
from typing import TYPE_CHECKING, Any, cast

from lightning_lora.tensors.inplace import overlay
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategies import deepspeed, sharded  # noqa: F401  # each registers itself
from lightning_lora.training.strategies.strategy import LoRAStrategy, methods_for

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def overlay_strategy(strategy: "Strategy", stage: Stage) -> LoRAStrategy:
    """Add the methods of LoRAStrategy to a strategy, once. They act in ``stage``."""
    if not isinstance(strategy, LoRAStrategy):
        methods = methods_for(strategy)
        strategy.__class__ = _below(type(strategy), methods.lora_skipped)
        overlay(strategy, methods)
    found = cast(LoRAStrategy, strategy)
    found.lora_stage = stage
    return found


@cache
def _below(kind: type, skipped: tuple[str, ...]) -> type:
    """A strategy's class, with the methods of the base class of all strategies for those that are skipped."""
    plain = next(ancestor for ancestor in kind.__mro__ if ancestor.__name__ == "Strategy")  # in both Lightning packages
    own: dict[str, Any] = {name: getattr(plain, name) for name in skipped}
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "lora_kind": kind, **own})

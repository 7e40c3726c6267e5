"""Add our methods to a Trainer's strategy. The file of each kind of strategy registers them."""

from collections.abc import Callable
from functools import cache, wraps
from inspect import isfunction
from typing import Any, cast

from lightning.pytorch.strategies import Strategy

from lightning_lora.tensors.inplace import class_names, overlay
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategies import deepspeed, sharded  # noqa: F401  # each registers itself
from lightning_lora.training.strategies.strategy import KINDS, LoRAStrategy


def overlay_strategy(strategy: Strategy, stage: Stage) -> LoRAStrategy:
    """Add the methods of LoRAStrategy to a strategy, once. They act in ``stage``, above what other code set on it."""
    held = vars(strategy)
    if not isinstance(strategy, LoRAStrategy):
        methods = next(map(KINDS.__getitem__, class_names(strategy) & KINDS.keys()), LoRAStrategy)
        methods.lora_check(strategy)
        ours, below = _calling(methods, type(strategy))
        held["lora_depths"], held["lora_others"] = {}, held.get("lora_others", {})
        strategy.__class__ = below
        overlay(strategy, ours)
    found = cast(LoRAStrategy, strategy)
    for name in _methods_of(type(found)):
        method, other = getattr(type(found), name).__get__(found), held.get(name)
        if other is None:
            found.lora_others.pop(name, None)
        elif other != method:
            others = found.lora_others.setdefault(name, [])
            others += [other] if other not in others else []
            held[name] = method  # the other one is called below it, once
    found.lora_stage = stage
    return found


def _methods_of(mixin: type[LoRAStrategy]) -> list[str]:
    """The methods of a strategy that a mixin has."""
    found = dict[str, Any]()
    for ancestor in mixin.__mro__:
        if issubclass(ancestor, LoRAStrategy):
            found |= vars(ancestor)
    return [name for name, value in found.items() if isfunction(value) and not name.startswith(("_", "lora_"))]


@cache
def _calling(mixin: type[LoRAStrategy], kind: type) -> tuple[type[LoRAStrategy], type]:
    """A mixin and a strategy's class whose methods are called one after another. Those of other code come between."""
    plain = next(ancestor for ancestor in kind.__mro__ if ancestor.__name__ == "Strategy")  # in both Lightning packages
    above: dict[str, Any] = {"__module__": mixin.__module__}
    below: dict[str, Any] = {"__module__": kind.__module__, "lora_kind": kind}
    for name in _methods_of(mixin):
        own = getattr(plain if name in mixin.lora_skipped else kind, name, None)
        above[name], below[name] = (_call_next(getattr(mixin, name), own, depth) for depth in (0, 1))
    return type(mixin.__name__, (mixin,), above), type(kind.__name__, (kind,), below)


def _call_next(ours: Callable[..., Any], own: Any, first: int) -> Callable[..., Any]:
    """A method that calls the next below those that run: ours, what other code has set (the latest first), its own."""
    name = ours.__name__

    @wraps(ours)
    def call(strategy: LoRAStrategy, *args: Any, **kwargs: Any) -> Any:
        running = strategy.lora_depths.get(name, 0)
        others = strategy.lora_others.get(name, []) if name in vars(strategy) else []
        depth = max(first, running + (not isinstance(strategy, LoRAStrategy)))  # ours is left out if it was given back
        strategy.lora_depths[name] = depth + 1
        try:
            if depth == 0:
                return ours(strategy, *args, **kwargs)
            return others[-depth](*args, **kwargs) if depth <= len(others) else own(strategy, *args, **kwargs)
        finally:
            strategy.lora_depths[name] = running

    return call

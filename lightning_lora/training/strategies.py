"""Choose what is added to a strategy."""

from collections.abc import Callable
from functools import cache, partial, partialmethod, wraps
from inspect import isfunction
from typing import TYPE_CHECKING, Any, cast

import torch
from packaging.version import Version

from lightning_lora.errors import StrategyError
from lightning_lora.tensors.inplace import class_names, overlay
from lightning_lora.training.deepspeed import LoRADeepSpeedStrategy
from lightning_lora.training.sharded import LoRAShardedStrategy
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategy import LoRAStrategy

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def overlay_strategy(strategy: "Strategy", stage: Stage) -> LoRAStrategy:
    """Add the methods of LoRAStrategy to a strategy, once, to act in ``stage``, above what other code has set on it."""
    held = vars(strategy)
    if not isinstance(strategy, LoRAStrategy):
        mixin = _mixin_for(strategy)
        held |= {"lora_others": {}, "lora_depths": {}}
        strategy.__class__ = _calling(type(strategy), mixin)
        overlay(strategy, _acting_once(mixin))
    found = cast(LoRAStrategy, strategy)
    for name in _methods_of(type(found)):
        ours, other = getattr(type(found), name).__get__(found), held.get(name)
        if other is None:
            found.lora_others.pop(name, None)
        elif other != ours:
            found.lora_others.setdefault(name, []).append(other)
            held[name] = ours  # the other one is called below it, once
    found.lora_stage = stage
    return found


def _methods_of(mixin: type[LoRAStrategy]) -> list[str]:
    """The methods of a strategy that a mixin has."""
    found = dict[str, Any]()
    for base in mixin.__mro__:
        if issubclass(base, LoRAStrategy):
            found |= vars(base)
    return [name for name, value in found.items() if isfunction(value) and not name.startswith(("_", "lora_"))]


@cache
def _calling(kind: type, mixin: type[LoRAStrategy]) -> type:
    """A subclass of a strategy's class with the methods that ``super()`` in ``mixin`` will call."""
    plain = next(base for base in kind.__mro__ if base.__name__ == "Strategy")  # in both Lightning packages
    methods = {name: plain if name in mixin.lora_skipped else kind for name in _methods_of(mixin)}
    own = {name: getattr(owner, name) for name, owner in methods.items() if hasattr(owner, name)}
    called = {name: partialmethod(_call_below, name) for name in own}
    namespace = {"lora_kind": kind, "lora_own": own, "__module__": kind.__module__, **called}
    return type(kind.__name__, (kind,), namespace)


def _call_below(strategy: LoRAStrategy, name: str, *args: Any, **kwargs: Any) -> Any:
    """Call what other code has set under this name, the latest first; or, below all of it, the class's own method."""
    depth, others = strategy.lora_depths.get(name, 0), strategy.lora_others.get(name, [])
    methods = [partial(strategy.lora_own[name], strategy), *(others if name in vars(strategy) else [])]
    strategy.lora_depths[name] = depth + 1
    try:
        return methods[-1 - depth](*args, **kwargs)
    finally:
        strategy.lora_depths[name] = depth


@cache
def _acting_once(mixin: type[LoRAStrategy]) -> type[LoRAStrategy]:
    """A mixin whose methods act once in a call, though what other code has set below them may call them again."""

    def once(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def act(strategy: LoRAStrategy, *args: Any, **kwargs: Any) -> Any:
            if strategy.lora_depths.get(name):
                return _call_below(strategy, name, *args, **kwargs)
            return method(strategy, *args, **kwargs)

        return act

    methods = {name: once(name, getattr(mixin, name)) for name in _methods_of(mixin)}
    return type(mixin.__name__, (mixin,), {"__module__": mixin.__module__, **methods})


def _mixin_for(strategy: "Strategy") -> type[LoRAStrategy]:
    names, called = class_names(strategy), type(strategy).__name__
    if "ModelParallelStrategy" in names:
        if Version(torch.__version__) < Version("2.7"):
            raise StrategyError(f"ModelParallelStrategy with LoRACallback needs torch 2.7. Found {torch.__version__}.")
        return LoRAShardedStrategy
    if "DeepSpeedStrategy" in names:
        config: Any = strategy.config or {}  # type: ignore[attr-defined]  # read from its arguments or from a file
        stage = int((config.get("zero_optimization") or {}).get("stage", 0))
        if stage in (1, 2):
            return LoRADeepSpeedStrategy
        if stage == 0:
            raise StrategyError(f"{called} without ZeRO shards nothing. Use strategy='ddp', or ZeRO stage 1 or 2.")
        called += f" with ZeRO stage {stage}"
    if strategy.restore_checkpoint_after_setup:
        is_known = {"FSDPStrategy", "DeepSpeedStrategy"} & {*names}
        why = "shards the model in a way that" if is_known else "restores checkpoints after its set-up, which"
        raise StrategyError(
            f"{called} {why} LoRACallback does not support. Use ModelParallelStrategy, and shard the model in "
            "configure_model:\n" + CONFIGURE_MODEL
        )
    return LoRAStrategy


CONFIGURE_MODEL = """
    def configure_model(self):
        if self.model is None:
            self.model = ...  # build it here
            mesh = self.device_mesh["data_parallel"]
            for block in self.model.layers:  # the blocks of a transformer
                fully_shard(block, mesh=mesh)  # from torch.distributed.fsdp
            fully_shard(self.model, mesh=mesh)

    Trainer(strategy=ModelParallelStrategy(data_parallel_size=8, tensor_parallel_size=1), ...)
"""
"""What a user of another sharding strategy needs to write."""

"""Choose what is added to a strategy."""

from functools import cache, partialmethod
from typing import TYPE_CHECKING, Any, cast

import torch
from packaging.version import Version

from lightning_lora.errors import StrategyError
from lightning_lora.tensors.inplace import overlay
from lightning_lora.training.deepspeed import LoRADeepSpeedStrategy
from lightning_lora.training.sharded import LoRAShardedStrategy
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategy import LoRAStrategy

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy


def overlay_strategy(strategy: "Strategy", stage: Stage) -> LoRAStrategy:
    """Add the methods of :class:`LoRAStrategy` to a strategy, once, and let them act in ``stage``.

    Methods that other code has set on the strategy before are called by these. Those that it sets later call these.
    """
    if not isinstance(strategy, LoRAStrategy):
        mixin, held = _mixin_for(strategy), vars(strategy)
        others = {name: held.pop(name) for name in list(held) if hasattr(mixin, name)}
        held["lora_others"] = others
        strategy.__class__ = _calling(type(strategy), mixin, tuple(others))
        overlay(strategy, mixin)
    found = cast(LoRAStrategy, strategy)
    found.lora_stage = stage
    return found


@cache
def _calling(kind: type, mixin: type[LoRAStrategy], others: tuple[str, ...]) -> type:
    """A subclass of a strategy's class with the methods that ``super()`` in ``mixin`` finds."""
    plain = next(base for base in kind.__mro__ if base.__name__ == "Strategy")  # in both Lightning packages
    skipped = {name: getattr(plain, name) for name in mixin.lora_skipped}
    called = {name: partialmethod(_call_other, name) for name in others}
    return type(kind.__name__, (kind,), {"lora_kind": kind, "__module__": kind.__module__, **skipped, **called})


def _call_other(strategy: LoRAStrategy, name: str, *args: Any, **kwargs: Any) -> Any:
    return strategy.lora_others[name](*args, **kwargs)


def _mixin_for(strategy: "Strategy") -> type[LoRAStrategy]:
    names = [base.__name__ for base in type(strategy).__mro__]  # in both Lightning packages
    called = type(strategy).__name__
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
        raise StrategyError(
            f"{called} shards the model in a way that LoRACallback does not support. Use ModelParallelStrategy, and "
            "shard the model in configure_model:\n" + CONFIGURE_MODEL
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

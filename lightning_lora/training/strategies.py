"""Choose what is set on a strategy."""

from typing import TYPE_CHECKING, Any

import torch
from packaging.version import Version

from lightning_lora.errors import StrategyError
from lightning_lora.training.deepspeed import DeepSpeedWatch
from lightning_lora.training.sharded import ShardedWatch
from lightning_lora.training.stage import Stage
from lightning_lora.training.strategy import Watch

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

_ATTRIBUTE = "_lora_watch"
"""The attribute of a strategy that holds its :class:`Watch`."""


def watch(strategy: "Strategy", stage: Stage) -> Watch:
    """Set the methods of a :class:`Watch` on ``strategy``.

    They stay there after the stage, so files are adapter-only after a fit and after an exception too.

    Raises:
        StrategyError: the strategy shards or restores the model in a way that is not supported.
    """
    found: Watch | None = watch_of(strategy)
    if found is None:
        found = _kind_for(strategy)(strategy)
        vars(strategy)[_ATTRIBUTE] = found
    found.install(stage)
    return found


def watch_of(strategy: "Strategy") -> Watch | None:
    """Return what :func:`watch` has set, or None."""
    found: Watch | None = vars(strategy).get(_ATTRIBUTE)
    return found


def _kind_for(strategy: "Strategy") -> type[Watch]:
    names = [base.__name__ for base in type(strategy).__mro__]  # in both Lightning packages
    called = type(strategy).__name__
    if "ModelParallelStrategy" in names:
        if Version(torch.__version__) < Version("2.7"):
            raise StrategyError(f"ModelParallelStrategy with LoRACallback needs torch 2.7. Found {torch.__version__}.")
        return ShardedWatch
    if "DeepSpeedStrategy" in names:
        stage = _zero_stage(strategy)
        if stage in (1, 2):
            return DeepSpeedWatch
        if stage == 0:
            raise StrategyError(f"{called} without ZeRO shards nothing. Use strategy='ddp', or ZeRO stage 1 or 2.")
        called += f" with ZeRO stage {stage}"
    if strategy.restore_checkpoint_after_setup:
        raise StrategyError(
            f"{called} shards the model in a way that LoRACallback does not support. Use ModelParallelStrategy, and "
            "shard the model in configure_model:\n" + CONFIGURE_MODEL
        )
    return Watch


def _zero_stage(strategy: Any) -> int:
    """The stage in DeepSpeed's configuration, which the strategy has read from its arguments or from a file."""
    zero = (strategy.config or {}).get("zero_optimization")
    return int(zero.get("stage", 0)) if zero else 0


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

"""Strategies that shard the model in a way that adapters do not know."""

from typing import NoReturn

from lightning_lora.errors import StrategyError

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


def refuse_strategy(
    called: str, why: str = "shards the model in a way that"
) -> NoReturn:
    """Refuse a strategy, and say how to shard a model instead."""
    raise StrategyError(
        f"{called} {why} LoRACallback does not support. Use ModelParallelStrategy, and "
        "shard the model in "
        "configure_model:\n" + CONFIGURE_MODEL
    )

"""DeepSpeed on the CPU, with gloo: Lightning's strategy asks for CUDA."""

import importlib
import os
import warnings
from contextlib import suppress
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    deepspeed = pytest.importorskip("deepspeed")
    with suppress(ImportError):  # it compiles functions: here, and not in each process
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
# compiled at its first use, for a minute
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class CpuDeepSpeed(DeepSpeedStrategy):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(process_group_backend="gloo", **kwargs)
        self.config["zero_force_ds_cpu_optimizer"] = False  # its own is compiled too

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

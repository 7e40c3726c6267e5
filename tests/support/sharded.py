"""A small transformer in configure_model, and fits of it in two processes."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback
from tests.support.models import state, trainer
from tests.support.ranks import has_shards

if not has_shards:
    pytest.skip("torch 2.7", allow_module_level=True)
fully_shard: Any = fsdp.fully_shard

has_deepspeed = find_spec("deepspeed") is not None

WIDTH, CLASSES = 16, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x) + self.q(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.Sequential(*self.layers)(x))


def pretrained() -> dict[str, Tensor]:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return {
            name: value + 0.1 * torch.randn_like(value)
            for name, value in Net().state_dict().items()
        }


def pretrained_in_module() -> dict[str, Tensor]:
    """The same, by the names that they have in a module."""
    return {f"model.{name}": value for name, value in pretrained().items()}


def shard(model: Any, layers: Iterable[Any], mesh: Any) -> None:
    """Shard each layer, then the rest."""
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class LitNet(L.LightningModule):
    """A classifier that is sharded under ModelParallelStrategy alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = self.built()
            if isinstance(self.trainer.strategy, ModelParallelStrategy):
                self.shard()

    def built(self) -> Net:
        net = Net()
        net.load_state_dict(pretrained())
        return net

    def shard(self) -> None:
        shard(self.model, self.model.layers, self.device_mesh["data_parallel"])

    def loss(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("loss", self.loss(batch), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class InPairs(LitNet):
    """Shards in each pair of processes, and holds the same in all pairs (HSDP)."""

    def shard(self) -> None:
        shard(
            self.model,
            self.model.layers,
            init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")),
        )


def data() -> DataLoader[Any]:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(32, WIDTH, generator=draws)
    y = torch.randint(0, CLASSES, (32,), generator=draws)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def lora(**kwargs: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "dropout": 0.1, "merge": False, **kwargs})


def trainer_of(
    kind: str, folder: Path, callbacks: list[L.Callback], **kwargs: Any
) -> L.Trainer:
    """A Trainer of two processes or more ("ddp", "sharded", "zero1" or "zero2"), or of one ("one")."""
    options: dict[str, Any] = {"enable_checkpointing": False}
    if kind != "one":
        options |= {
            "devices": 2,
            "strategy": strategy_of(kind, kwargs.get("devices", 2)),
        }
    return trainer(folder, callbacks, **options | kwargs)


def strategy_of(kind: str, size: int = 2) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind.startswith("zero"):
        from tests.support.cpu_deepspeed import CpuDeepSpeed

        return CpuDeepSpeed(stage=int(kind[-1]))
    return ModelParallelStrategy(size, 1, save_distributed_checkpoint=kind == "sharded")


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, whole."""
    found = state(module)
    return {
        name: value.full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in found.items()
    }

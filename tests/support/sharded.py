"""A small transformer in configure_model, and fits of it in two processes."""

from collections.abc import Callable
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
from torch.utils._pytree import keystr, tree_flatten_with_path
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRAError, load_adapter
from tests.support.ranks import has_shards, run_ranks

if not has_shards:
    pytest.skip("torch 2.7", allow_module_level=True)
fully_shard: Any = fsdp.fully_shard

has_deepspeed = find_spec("deepspeed") is not None

WIDTH, CLASSES = 16, 3
State = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x) + self.q(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def pretrained() -> dict[str, Tensor]:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return {name: value + 0.1 * torch.randn_like(value) for name, value in Net().state_dict().items()}


def shard(net: Net, mesh: Any) -> None:
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)


class LitNet(L.LightningModule):
    """A classifier that is sharded under ModelParallelStrategy alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model: Net | None = None

    def configure_model(self) -> None:
        if self.model is not None:
            return
        self.model = self.built()
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.shard()

    def built(self) -> Net:
        net = Net()
        net.load_state_dict(pretrained())
        return net

    def shard(self) -> None:
        assert self.model is not None
        shard(self.model, self.device_mesh["data_parallel"])

    def loss(self, batch: list[Tensor]) -> Tensor:
        assert self.model is not None
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
        shard(self.model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def data() -> DataLoader[Any]:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, WIDTH, generator=draws), torch.randint(0, CLASSES, (32,), generator=draws)
    return DataLoader(TensorDataset(x, y), batch_size=4)


def lora(**kwargs: Any) -> LoRACallback:
    return LoRACallback(**{"r": 2, "dropout": 0.1, "merge": False, **kwargs})


def trainer_of(kind: str, folder: Path, callbacks: list[L.Callback], **kwargs: Any) -> L.Trainer:
    """A Trainer of two processes or more ("ddp", "sharded", "zero1" or "zero2"), or of one ("one")."""
    options: dict[str, Any] = {"max_epochs": 2, "logger": False, "enable_checkpointing": False}
    options["enable_model_summary"] = False
    if kind != "one":
        options |= {"devices": 2, "strategy": strategy_of(kind, kwargs.get("devices", 2))}
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        **{**options, **kwargs},
    )


def strategy_of(kind: str, size: int = 2) -> Any:
    if kind == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if kind.startswith("zero"):
        from tests.support.cpu_deepspeed import CpuDeepSpeed

        return CpuDeepSpeed(stage=int(kind[-1]))
    return ModelParallelStrategy(
        data_parallel_size=size, tensor_parallel_size=1, save_distributed_checkpoint=kind == "sharded"
    )


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module, whole."""
    found = {}
    for name, value in module.state_dict().items():
        found[name] = (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
    return found


class Saves(L.Callback):
    """Writes a file at the end of each epoch, as the user's code may: on every process."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(path_of(self.folder, self.kind, trainer.current_epoch))


def path_of(folder: Path, kind: str, epoch: int) -> Path:
    return folder / f"{kind}-{epoch}.ckpt"


def fit(
    kind: str,
    folder: Path,
    build: Callable[[], LitNet] = LitNet,
    kwargs: dict[str, Any] | None = None,
    path: Path | None = None,
    **options: Any,
) -> State:
    """Fit with LoRACallback(**kwargs), a file after each epoch, and options of the Trainer; return the state."""
    L.seed_everything(1, verbose=False)  # the samplers' seed
    module = build()
    torch.manual_seed(1 if path is None else 99)
    callbacks = [*options.pop("callbacks", []), lora(**kwargs or {}), Saves(folder, kind)]
    t = trainer_of(kind, folder, callbacks, **options)
    t.fit(module, data(), data(), ckpt_path=path, weights_only=True)
    return whole_state(module)


def fit_in_processes(kind: str, folder: Path, *args: Any, **options: Any) -> list[State]:
    return run_ranks(fit, kind, folder, *args, size=options.get("devices", 2), **options)


def built(path: Path) -> LitNet:
    """A module on one process with the adapters of a file."""
    module = LitNet()
    module.model = module.built()
    load_adapter(module, path)
    return module


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


def read(path: Path) -> dict[str, Any]:
    """The leaves of a checkpoint, by path."""
    leaves, _ = tree_flatten_with_path(torch.load(path, weights_only=True))
    return {keystr(keys): value for keys, value in leaves}


def differing(found: Path, expected: Path, part: str = "") -> list[str]:
    """The leaves of two files that are not the same to the bit, among those with this in their names."""
    ours, theirs = read(found), read(expected)
    assert part or ours.keys() == theirs.keys()
    return [
        name
        for name, value in theirs.items()
        if part in name and not (torch.equal(ours[name], value) if isinstance(value, Tensor) else ours[name] == value)
    ]


def message_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The class and the text of the error, if there is one."""
    try:
        call(*args, **kwargs)
    except LoRAError as found:
        return f"{type(found).__name__}: {found}"
    return ""

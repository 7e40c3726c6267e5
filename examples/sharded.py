"""Train a Llama that is sharded over processes (FSDP2): first all of it, then adapters.

python examples/sharded.py           # about a minute on two CPU cores
python examples/sharded.py --fast    # some seconds on a few batches, to see that it runs

It starts a process for each GPU, or two on a CPU. All weights train on film reviews.
Then adapters train on Python code. The table shows what a process holds and sends in
both.
"""

import argparse
import gzip
import inspect
import logging
import tarfile
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from transformers import LlamaConfig

from lightning_lora import LoRACallback, load_adapter

REVIEWS = Path(__file__).parent / "data" / "movie_snippets.tsv.gz"
SHAPE = LlamaConfig(
    vocab_size=256,  # it reads bytes
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    use_cache=False,
)
LENGTH = 64  # bytes in a row of text
STEPS = 120


class ShardedLlama(LightningModule):
    """A Llama that is made, and sharded, when the Trainer asks for it.

    Args:
        lr: Learning rate.
        base: A checkpoint with pretrained weights.
    """

    def __init__(self, lr: float = 0.0, base: Path | None = None) -> None:
        super().__init__()
        self.lr = lr
        self.base = base
        self.model: Any = None

    def configure_model(self) -> None:
        """Make the model, load it, and shard it if the strategy has a mesh of processes."""
        if self.model is not None:
            return
        # not above, where what it imports would not be quiet yet
        from transformers import LlamaForCausalLM

        self.model = LlamaForCausalLM(SHAPE)
        if self.base is not None:
            checkpoint = torch.load(self.base, map_location="cpu", weights_only=True)
            self.load_state_dict(checkpoint["state_dict"])
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            for layer in self.model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self.model, mesh=mesh)

    def forward(self, text: Tensor) -> Tensor:
        """Return the loss of predicting each next byte."""
        loss: Tensor = self.model(input_ids=text, labels=text).loss
        return loss

    def training_step(self, text: Tensor) -> Any:
        """Return the loss."""
        return self(text)

    def validation_step(self, text: Tensor) -> None:
        """Log the mean loss of all processes."""
        self.log("loss", self(text), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over all parameters; LoRACallback keeps those that train."""
        return torch.optim.AdamW(self.parameters(), self.lr)


def reviews() -> Tensor:
    """Return rows of film reviews."""
    text = ""
    with gzip.open(REVIEWS, "rt", encoding="utf-8") as file:
        for line in file:
            text += line.rpartition("\t")[2]
    return rows(text)


def code() -> Tensor:
    """Return rows of Python code, from Python's own library."""
    sources = map(inspect.getsource, (argparse, inspect, tarfile))
    return rows("".join(sources))


def rows(text: str) -> Tensor:
    """Cut text into rows of bytes."""
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    end = len(data) // LENGTH * LENGTH
    return data[:end].long().view(-1, LENGTH)


def batches(text: Tensor, *, shuffle: bool = False) -> DataLoader[Tensor]:
    """Return batches of rows. The Trainer gives each process its own."""
    return DataLoader(text, batch_size=16, shuffle=shuffle)  # type: ignore[arg-type]


class Traffic(TorchDispatchMode):
    """Counts bytes that are sent.

    A message counts whole: what an all-gather returns, what others begin with.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what is done to its parts comes here too
        if func.namespace == "c10d":
            name = func.__name__.partition(".")[0]
            self.bytes[name] += max(size_of(tree_leaves(arg)) for arg in args)
        return func(*args, **(kwargs or {}))


class Meter(Callback):
    """Counts what a process sends in the second step, and what it holds then."""

    def __init__(self) -> None:
        self.counting = ExitStack()
        self.sent = Traffic()
        self.held: dict[str, int] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """Begin to count."""
        if trainer.global_step == 1:
            self.counting.enter_context(self.sent)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any
    ) -> None:
        """End the count."""
        if trainer.global_step == 2:
            self.counting.close()
            adapters = [
                p for name, p in pl_module.named_parameters() if "lora_" in name
            ]
            states = [dict(optimizer.state) for optimizer in trainer.optimizers]
            self.held["weights"] = size_of(pl_module.parameters()) - size_of(adapters)
            self.held["adapters"] = size_of(adapters)
            self.held["optimizer"] = size_of(tree_leaves(states))

    def rows(self) -> dict[str, int]:
        """Return what was counted, with names for a table."""
        return {
            "Held: its part of the model": self.held["weights"],
            "Held: adapters": self.held["adapters"],
            "Held: optimizer's state": self.held["optimizer"],
            "Sent, weights: all-gather": self.sent.bytes["_allgather_base_"],
            "Sent, gradients: reduce-scatter": self.sent.bytes["_reduce_scatter_base_"],
            "Sent, gradients: all-reduce": self.sent.bytes["allreduce_"],
        }


def size_of(values: Iterable[Any]) -> int:
    """Add up the bytes that this process holds."""
    size = 0
    for value in values:
        if isinstance(value, DTensor):
            size += value.to_local().nbytes
        elif isinstance(value, Tensor):
            size += value.nbytes
    return size


def make_trainer(callbacks: list[Callback], *, steps: int) -> Trainer:
    """Return a Trainer with a process for each GPU, or two on a CPU."""
    on_gpu = torch.cuda.is_available()
    devices = torch.cuda.device_count() if on_gpu else 2
    strategy = ModelParallelStrategy(
        data_parallel_size=devices,
        tensor_parallel_size=1,
        # the pretrained model in one file too, as adapters always are
        save_distributed_checkpoint=False,
    )
    return Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        limit_train_batches=steps,
        callbacks=callbacks,
        enable_progress_bar=Console().is_terminal,  # elsewhere it would not move
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


@rank_zero_only
def say(text: str) -> None:
    """Print in the first process alone."""
    print(text, flush=True)


def run(folder: Path, *, fast: bool) -> None:
    """Pretrain, train adapters, and load their file in one process.

    Every process runs this.
    """
    seed_everything(0, verbose=False)
    steps = 4 if fast else STEPS
    seen, unseen = code()[:-256], code()[-256:]

    duration = "Some seconds" if fast else "About a minute"
    say(f"{duration} on two CPU cores. All weights train on film reviews ...")
    of_all = Meter()
    trainer = make_trainer([of_all], steps=steps)
    pretrained = ShardedLlama(lr=3e-3)
    trainer.fit(pretrained, batches(reviews(), shuffle=True))
    folder = trainer.strategy.broadcast(folder)  # the first process's, for all
    base, adapters = folder / "base.ckpt", folder / "adapters.ckpt"
    trainer.save_checkpoint(base, weights_only=True)
    before = loss_on(unseen, trainer, pretrained)

    say("Adapters train on Python code ...")
    of_lora = Meter()
    trainer = make_trainer([LoRACallback(r=8, merge=False), of_lora], steps=steps)
    module = ShardedLlama(lr=1e-2, base=base)
    trainer.fit(module, batches(seen, shuffle=True))
    trainer.save_checkpoint(adapters, weights_only=True)
    after = loss_on(unseen, trainer, module)

    if trainer.is_global_zero:
        table = Table(
            "In each process", title=f"The second step. Processes: {trainer.world_size}"
        )
        table.add_column("all weights", justify="right")
        table.add_column("LoRA", justify="right")
        for name, size in of_all.rows().items():
            size_with_lora = of_lora.rows()[name]
            table.add_row(name, decimal(size), decimal(size_with_lora))
        sizes = base.stat().st_size, adapters.stat().st_size
        table.add_row("Checkpoint, weights only", *map(decimal, sizes))
        table.add_section()
        table.add_row("Loss on new code", f"{before:.2f}", f"{after:.2f}")
        Console().print(table)
        check_in_one_process(base, adapters, unseen, after)
    trainer.strategy.barrier()  # then the folder may be deleted


def loss_on(text: Tensor, trainer: Trainer, module: LightningModule) -> float:
    """Return the mean loss on rows of text."""
    (found,) = trainer.validate(module, batches(text), verbose=False)
    return found["loss"]


def check_in_one_process(
    base: Path, adapters: Path, text: Tensor, expected: float
) -> None:
    """Load both files into a whole model, as on a single device."""
    module = ShardedLlama(base=base)
    module.configure_model()
    load_adapter(module, adapters)
    with torch.no_grad():
        loss = float(module.eval()(text))
    assert abs(loss - expected) < 1e-3, "one process computes another loss"


def quiet() -> None:
    """Show progress bars and the table, without what other packages say about themselves."""
    for package in ("lightning.fabric", "lightning.pytorch"):
        logging.getLogger(package).setLevel(logging.WARNING)
    for package in ("torch.utils._pytree", "torchao"):
        logging.getLogger(package).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers",
        ".*no `val_dataloader`",
        "Using `Distrib",
        ".*is deprecated, use",
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fast", action="store_true", help="a few batches only")
    parser.add_argument(
        "--output",
        type=Path,
        help="keep the files in this folder; otherwise they are deleted",
    )
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        run(options.output or Path(temporary), fast=options.fast)

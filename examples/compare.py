"""Compare LoRA with full fine-tuning and with a frozen model.

python examples/compare.py                 # film reviews, the job of sentiment.py
python examples/compare.py --job vision    # handwritten digits, the job of vision.py
python examples/compare.py --grid          # the validation accuracy at each learning rate
python examples/compare.py --fast          # on a little of the data, to see that it runs

Each method has the same batches, epochs and schedule, and the learning rate that was best for it on validation data.
"""

import argparse
import logging
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, ParamSpec, TypeVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Method:
    """One way to train a model.

    Args:
        rates: Learning rates, and the validation accuracy of each in per cent, as ``--grid`` measured it.
        lora: Arguments of LoRACallback, or None to train without it.
        head_only: Freeze everything but the new head.
    """

    rates: dict[float, float]
    lora: dict[str, Any] | None = None
    head_only: bool = False

    @property
    def lr(self) -> float:
        """The best learning rate."""
        return max(self.rates, key=self.rates.__getitem__)


@dataclass(frozen=True)
class Job:
    """A model, its data, and the methods to compare.

    Args:
        module: Builds the model from a learning rate.
        data: Builds the data, or a part of it.
        pretrained: The module's attribute that holds pretrained weights; ``head`` holds the new ones.
        epochs: How long to train.
        methods: What to compare, by name. One is called "full".
    """

    module: Callable[[float], LightningModule]
    data: Callable[[int | None], LightningDataModule]
    pretrained: str
    epochs: int
    methods: dict[str, Method]


def sentiment_job() -> Job:
    """Return the job of sentiment.py."""
    from sentiment import EPOCHS, SentimentModule, Snippets

    methods = {
        # A standard error is 1.5 (541 texts, one seed). LoRA's at 4e-3, and with r=16 at 2e-3, had other batches: they
        # are from before a fit drew the adapters' first values apart from all else.
        "LoRA, all linear, r=16": Method(
            {1e-3: 85.8, 2e-3: 84.8, 4e-3: 50.1}, lora={"r": 16, "target_modules": "all-linear"}
        ),
        "LoRA, q and v, r=8": Method(
            {1e-3: 83.9, 2e-3: 84.5, 4e-3: 83.0}, lora={"r": 8, "target_modules": ["query", "value"]}
        ),
        "full": Method({5e-5: 85.8, 1e-4: 86.9}),
        "head only": Method({1e-2: 80.0, 3e-2: 79.1}, head_only=True),
    }
    return Job(SentimentModule, lambda limit: Snippets(limit=limit), "encoder", EPOCHS, methods)


def vision_job() -> Job:
    """Return the job of vision.py."""
    from vision import EPOCHS, POINTWISE, Digits, VisionModule

    methods = {
        # A standard error is about 1 (297 images, one seed). Those of "full" and "head only" are of the epoch with the
        # lowest validation loss; --grid measures the last one.
        "LoRA, r=8": Method({2e-3: 98.7, 5e-3: 98.7}, lora={"r": 8, "target_modules": POINTWISE}),
        "full": Method({3e-4: 99.0, 1e-3: 99.0}),
        "head only": Method({3e-2: 93.6, 1e-1: 95.6}, head_only=True),
    }
    return Job(VisionModule, lambda limit: Digits(limit=limit), "backbone", EPOCHS, methods)


JOBS = {"sentiment": sentiment_job, "vision": vision_job}


@dataclass(frozen=True)
class Result:
    """What one method gave, and what it cost.

    Args:
        validation: Accuracy on the validation part.
        test: Accuracy on the test part; None if only validation was asked for.
        trained: Parameters that trained.
        optimizer_bytes: Size of the tensors in the optimizer's state.
        checkpoint_bytes: Size of the Trainer's checkpoint, weights only.
        memory_bytes: How much training raised the peak memory of the process, above that of loading and validation.
    """

    validation: float
    test: float | None
    trained: int
    optimizer_bytes: int
    checkpoint_bytes: int
    memory_bytes: int


class StepTimer(Callback):
    """Time each training step."""

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        """Note the time."""
        self.started = perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        """Note how long the step took."""
        self.seconds.append(perf_counter() - self.started)


def train(job_name: str, method_name: str, lr: float, *, fast: bool, test: bool) -> Result:
    """Train by one method, and measure it."""
    quiet()
    job = JOBS[job_name]()
    module, callbacks = prepare(job, job.methods[method_name], lr)
    data = job.data(128 if fast else None)
    trainer = make_trainer(callbacks, epochs=1 if fast else job.epochs)
    trainer.validate(module, data, verbose=False)
    memory = peak_memory()
    trainer.fit(module, data)
    memory = peak_memory() - memory
    optimizer = trainer.optimizers[0]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "weights.ckpt"
        trainer.save_checkpoint(checkpoint, weights_only=True)
        checkpoint_bytes = checkpoint.stat().st_size
    return Result(
        validation=trainer.validate(module, data, verbose=False)[0]["val_accuracy"],
        test=trainer.test(module, data, verbose=False)[0]["test_accuracy"] if test else None,
        trained=sum(p.numel() for group in optimizer.param_groups for p in group["params"] if p.requires_grad),
        optimizer_bytes=state_bytes(optimizer),
        checkpoint_bytes=checkpoint_bytes,
        memory_bytes=memory,
    )


def time_steps(job_name: str, *, rounds: int, steps: int) -> dict[str, float]:
    """Return each method's step time over that of full fine-tuning.

    In each round all methods take turns on the same batches, so that other work on the machine slows all of them.
    """
    quiet()
    job = JOBS[job_name]()
    data = job.data(None)
    data.setup("fit")
    chosen: Any = list(islice(data.train_dataloader(), steps))
    batches = DataLoader[Any](chosen, batch_size=None)
    ratios: dict[str, list[float]] = {name: [] for name in job.methods}
    for _ in range(rounds):
        seconds = {}
        for name, method in job.methods.items():
            timer = StepTimer()
            module, callbacks = prepare(job, method, method.lr)
            make_trainer([*callbacks, timer], epochs=1).fit(module, batches)
            seconds[name] = median(timer.seconds)
        for name, taken in seconds.items():
            ratios[name].append(taken / seconds["full"])
    return {name: median(taken) for name, taken in ratios.items()}


def prepare(job: Job, method: Method, lr: float) -> tuple[LightningModule, list[Callback]]:
    """Return a new model and the callbacks of a method."""
    seed_everything(0, verbose=False)
    module = job.module(lr)
    if method.lora is not None:
        return module, [LoRACallback(**method.lora, modules_to_save=["head"])]
    pretrained = module.get_submodule(job.pretrained)
    pretrained.eval()  # BatchNorm keeps its statistics, as it does with LoRACallback
    pretrained.requires_grad_(not method.head_only)
    return module, []


def make_trainer(callbacks: list[Callback], *, epochs: int) -> Trainer:
    """Return a Trainer that writes no files of its own."""
    return Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def state_bytes(optimizer: Optimizer) -> int:
    """Add up the tensors that an optimizer keeps."""
    return sum(
        value.nbytes for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
    )


def peak_memory() -> int:
    """Return the most memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def quiet() -> None:
    """Show progress bars and tables, without Lightning's own messages."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (".*does not have many workers", ".*in eval mode at the start", ".*no `val_dataloader`"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=FutureWarning, module="lightning")


def in_own_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a new process, to measure memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def comparison(job_name: str, *, fast: bool) -> Table:
    """Train by each method, and return the table of results."""
    console, methods = Console(), JOBS[job_name]().methods
    results = {}
    for name, method in methods.items():
        console.print(f"[bold]{name}[/bold]")
        results[name] = in_own_process(train, job_name, name, method.lr, fast=fast, test=True)
    console.print("[bold]The time of a step: all methods in turn[/bold]")
    times = in_own_process(time_steps, job_name, rounds=1 if fast else 7, steps=3 if fast else 20)
    table = Table("", title="The same batches, epochs and schedule")
    table.caption = "Checkpoints hold weights only. Memory is what training adds to the peak of its process."
    for name in methods:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[Result], str]] = {
        "Test accuracy": lambda result: f"{result.test:.1%}",
        "Trained parameters": lambda result: f"{result.trained:,}",
        "Optimizer bytes": lambda result: f"{result.optimizer_bytes:,}",
        "Checkpoint bytes": lambda result: f"{result.checkpoint_bytes:,}",
        "Memory added": lambda result: f"{result.memory_bytes / 1e6:,.0f} MB",
    }
    for name, shown in rows.items():
        table.add_row(name, *map(shown, results.values()))
    table.add_row("Step time, full = 1", *(f"{times[name]:.2f}" for name in methods))
    return table


def grid(job_name: str, *, fast: bool) -> Table:
    """Return the validation accuracy of each learning rate."""
    table = Table("Method", "Learning rate", "Validation accuracy", title="Nothing is tested here")
    for name, method in JOBS[job_name]().methods.items():
        for lr in method.rates:
            result = in_own_process(train, job_name, name, lr, fast=fast, test=False)
            Console().print(f"{name}, {lr:g}: {result.validation:.1%}")
            table.add_row(name, f"{lr:g}", f"{result.validation:.1%}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", choices=JOBS, default="sentiment", help="which example's model and data")
    parser.add_argument("--grid", action="store_true", help="try the learning rates instead, on the validation part")
    parser.add_argument("--fast", action="store_true", help="a little of the data and one epoch")
    options = parser.parse_args()
    Console().print((grid if options.grid else comparison)(options.job, fast=options.fast))

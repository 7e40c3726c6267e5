"""Cost of the callback per training step and per checkpoint."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters
from tests.benchmarks.measure import Bench, Row, middle_half
from tests.benchmarks.models import Bert

_QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


class Task(LightningModule):
    """A model with a meaningless loss."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.bert = Bert(layers)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.bert(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def trainer(bench: Bench) -> Iterator[Row]:
    """The callback's hooks per step, and checkpoints compared with a plain Trainer's."""
    spent = [_hook_seconds() for _ in range(3)]
    shares = [seconds / 0.1 for seconds in spent]
    yield Row("the callback's hooks in a training step (72 layers)", "share of 100 ms", median(shares), 0.002)
    yield from _checkpoints(bench)


def _hook_seconds() -> float:
    """Return the median time per step in the callback's hooks."""
    callback, spent = LoRACallback(r=8, merge=False), [0.0]
    hooks = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward")
    for name in (*hooks, "on_before_optimizer_step", "on_train_batch_end"):
        hook = getattr(callback, name)

        def timed(*args: Any, hook: Any = hook, **kwargs: Any) -> Any:
            before = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                spent[-1] += time.perf_counter() - before

        setattr(callback, name, timed)

    class Mark(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            spent.append(0.0)

    data = DataLoader(torch.randn(30, 2, 768), batch_size=1)
    Trainer(callbacks=[callback, Mark()], max_steps=30, **_QUIET).fit(Task(12), data)
    return median(spent[5:-1])


def _checkpoints(bench: Bench) -> Iterator[Row]:
    """Write checkpoints of the 109 M model after an AdamW step, with and without the callback."""
    data, sizes, times, arithmetic = DataLoader(torch.randn(2, 4, 768), batch_size=1), {}, {}, 0
    for name, callbacks in (("plain", []), ("lightning_lora", [LoRACallback(r=8, merge=False)])):
        task = Task(12)
        if not callbacks:
            inject_adapters(task, LoRAConfig(r=8))
        it = Trainer(callbacks=callbacks, max_steps=1, **_QUIET)
        it.fit(task, data)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.ckpt"
            times[name] = bench.take_turns({name: lambda it=it, path=path: it.save_checkpoint(path)})[name]
            sizes[name] = path.stat().st_size
        arithmetic = 3 * sum(p.nbytes for p in task.parameters() if p.requires_grad)  # AdamW keeps two values for each
    case = "checkpoint of BERT-base, all linear"
    yield Row(case, "bytes over adapters and their AdamW state", sizes["lightning_lora"] / arithmetic, 1.05)
    yield Row(case, "bytes over a plain Trainer's", sizes["lightning_lora"] / sizes["plain"])
    values = [a / b for a, b in zip(times["lightning_lora"], times["plain"], strict=True)]
    yield Row(case, "time over a plain Trainer's", median(values), None, middle_half(values))

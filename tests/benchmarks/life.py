"""Cost of the callback around the steps: start, save, evaluation, end of a fit."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters
from tests.benchmarks.measure import Bench, Row, middle_half
from tests.benchmarks.models import Bert
from tests.benchmarks.ways import OURS

_BASES = {"85 M": (12, 768), "300 M": (24, 1024)}
"""Layers and width, as in transformer encoders."""

_GOALS = {
    "set-up of fit": 0.4, "first save": 1.0, "save": 0.05, "end of fit": 1.6, "validate": 0.05, "test a file": 2.5,
}  # fmt: skip

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "max_steps": 1,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 1,
}


class Stack(LightningModule):
    """The linear layers of a transformer encoder, one after the other."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers, self.width = nn.Sequential(), width
        for _ in range(layers):
            sizes = [width] * 5 + [4 * width, width]  # q, k, v, o, up and down
            self.layers.extend(nn.Linear(*each, bias=False) for each in itertools.pairwise(sizes))
        for weight in self.parameters():  # signals keep their size: sums with denormal updates would take long
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: Tensor) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor) -> None:
        self(batch)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(1, self.width))

    val_dataloader = test_dataloader = train_dataloader


class Marks(Callback):
    """The times at which training begins and ends, and what the first save of the run takes."""

    began = ended = first_save = 0.0

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # before ModelCheckpoint's, which is the last
        self.first_save = _seconds(lambda: trainer.save_checkpoint(self.path))

    def on_train_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        self.ended = time.perf_counter()


def life(bench: Bench) -> Iterator[Row]:
    """Cost around the steps of a fit, in passes over the base (one clone of all parameters)."""
    for size, (layers, width) in _BASES.items():
        runs = [_moments(layers, width) for _ in range(3)]
        for moment, goal in _GOALS.items():
            passes, seconds = zip(*sorted(run[moment] for run in runs), strict=True)
            spread = (passes[0], passes[-1])
            yield Row(f"{moment}, base of {size}", "passes over the base", passes[0], goal, spread, {"s": seconds[0]})


def _moments(layers: int, width: int) -> dict[str, tuple[float, float]]:
    """Return each moment's passes over the base and seconds, less a plain Trainer's."""
    model = Stack(layers, width)
    one_pass = min(_seconds(lambda: [p.detach().clone() for p in model.parameters()]) for _ in range(3))
    ours, plain = _fit(model, adapted=True), _fit(Stack(layers, width), adapted=False)
    extra = {moment: ours[moment] - plain[moment] for moment in ours}
    return {moment: (seconds / one_pass, seconds) for moment, seconds in extra.items()}


def _fit(model: Stack, *, adapted: bool) -> dict[str, float]:
    """Time the moments of one fit, in seconds."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        marks = Marks(Path(folder) / "first.ckpt")
        callbacks: list[Callback] = [LoRACallback(r=8)] if adapted else []
        keep = ModelCheckpoint(folder, filename="best", save_weights_only=True, every_n_train_steps=1)
        trainer = Trainer(callbacks=[*callbacks, marks, keep], default_root_dir=folder, **QUIET)
        start = time.perf_counter()
        trainer.fit(model)
        found["set-up of fit"] = marks.began - start
        found["end of fit"] = time.perf_counter() - marks.ended
        # A plain Trainer's file would hold the base: its save is not measured, and its test loads none.
        found["first save"] = marks.first_save if adapted else 0.0
        found["save"] = _seconds(lambda: trainer.save_checkpoint(Path(folder) / "a.ckpt")) if adapted else 0.0
        found["validate"] = _seconds(lambda: trainer.validate(model, verbose=False))
        path = keep.best_model_path if adapted else None
        found["test a file"] = _seconds(lambda: trainer.test(model, ckpt_path=path, verbose=False))
    return found


def _seconds(run: Callable[[], object]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


class Encoder(LightningModule):
    """BERT-base with a meaningless loss."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = Bert()

    def training_step(self, batch: Tensor) -> Tensor:
        return self.bert(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def checkpoints(bench: Bench) -> Iterator[Row]:
    """Checkpoints of BERT-base and AdamW, compared with a plain Trainer's."""
    data, sizes, times, arithmetic = DataLoader(torch.randn(2, 4, 768), batch_size=1), {}, {}, 0
    for name, callbacks in (("plain", []), (OURS, [LoRACallback(r=8, merge=False)])):
        task = Encoder()
        if not callbacks:
            inject_adapters(task, LoRAConfig(r=8))
        it = Trainer(callbacks=callbacks, **QUIET, enable_checkpointing=False)
        it.fit(task, data)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "file.ckpt"
            times[name] = bench.take_turns({name: lambda it=it, path=path: it.save_checkpoint(path)})[name]
            sizes[name] = path.stat().st_size
        arithmetic = 3 * sum(p.nbytes for p in task.parameters() if p.requires_grad)  # AdamW keeps two values for each
    case = "checkpoint of BERT-base, all linear"
    yield Row(case, "bytes over adapters and their AdamW state", sizes[OURS] / arithmetic, 1.05)
    yield Row(case, "bytes over a plain Trainer's", sizes[OURS] / sizes["plain"])
    values = [a / b for a, b in zip(times[OURS], times["plain"], strict=True)]
    yield Row(case, "time over a plain Trainer's", median(values), None, middle_half(values))

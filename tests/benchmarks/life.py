"""Cost of the callback around the steps: start, save, evaluation, end of a fit."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, inject_adapters
from tests.benchmarks.measure import Bench, Row
from tests.benchmarks.models import Bert

_BASES = {"85 M": (12, 768), "300 M": (24, 1024)}
"""Layers and width, as in transformer encoders."""

_GOALS = {
    "set-up of fit": 0.4, "first save": 1.0, "save": 0.05, "end of fit": 1.6, "validate": 0.05, "test a file": 2.5,
}  # fmt: skip

QUIET: dict[str, Any] = {"accelerator": "cpu", "max_steps": 1, "num_sanity_val_steps": 0}
QUIET |= dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)


class Task(LightningModule):
    """A network with a meaningless loss, and one input of a shape."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD

    def __init__(self, network: nn.Module, *shape: int) -> None:
        super().__init__()
        self.network = network
        self.shape = shape

    def training_step(self, batch: Tensor) -> Tensor:
        return self.network(batch).square().mean()

    validation_step = test_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer([p for p in self.parameters() if p.requires_grad], lr=1e-4)  # type: ignore[call-arg]

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(1, *self.shape))

    val_dataloader = test_dataloader = train_dataloader


def stack(layers: int, width: int) -> Task:
    """The linear layers of a transformer encoder, one after the other."""
    sizes = [width] * 5 + [4 * width, width]  # q, k, v, o, up and down
    network = nn.Sequential(*(nn.Linear(*each, bias=False) for each in [*itertools.pairwise(sizes)] * layers))
    for weight in network.parameters():  # signals keep their size: sums with denormal updates would take long
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return Task(network, width)


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
    model = stack(layers, width)
    one_pass = min(_seconds(lambda: [p.detach().clone() for p in model.parameters()]) for _ in range(3))
    ours = _fit(model, adapted=True)
    plain = _fit(stack(layers, width), adapted=False)
    extra = {moment: ours[moment] - plain[moment] for moment in ours}
    return {moment: (seconds / one_pass, seconds) for moment, seconds in extra.items()}


def _fit(model: Task, *, adapted: bool) -> dict[str, float]:
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


def checkpoints(bench: Bench) -> Iterator[Row]:
    """Checkpoints of BERT-base and AdamW, compared with a plain Trainer's."""
    plain = _file_size()
    ours = _file_size(LoRACallback(r=8, merge=False))
    case = "checkpoint of BERT-base, all linear"
    yield Row(case, "bytes over adapters and their AdamW state", ours[0] / ours[1], 1.05)
    yield Row(case, "bytes over a plain Trainer's", ours[0] / plain[0])


def _file_size(*callbacks: Callback) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and those of what trains and its AdamW state alone."""
    task = Task(Bert(), 4, 768)
    task.optimizer = torch.optim.AdamW
    if not callbacks:
        inject_adapters(task, LoRAConfig(r=8))
    trainer = Trainer(callbacks=[*callbacks], **QUIET, enable_checkpointing=False)
    trainer.fit(task)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.ckpt"
        trainer.save_checkpoint(path)
        size = path.stat().st_size
    return size, 3 * sum(p.nbytes for p in task.parameters() if p.requires_grad)  # AdamW keeps two values for each

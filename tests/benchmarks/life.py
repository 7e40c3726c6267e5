"""Cost of the callback around the steps: start, save, evaluation, end of a fit."""

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
from tests.support.parameters import bytes_of, trainable

_BASES = {"85 M": (12, 768), "300 M": (24, 1024)}
"""Layers and width, as in transformer encoders."""

_GOALS = {
    "set-up of fit": 0.4, "first save": 1.0, "save": 0.05, "end of fit": 1.6, "validate": 0.05, "test a file": 2.5,
}  # fmt: skip

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "max_steps": 1,
    "num_sanity_val_steps": 0,
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


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
        return self.optimizer(trainable(self), lr=1e-4)  # type: ignore[call-arg]

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(1, *self.shape))

    val_dataloader = test_dataloader = train_dataloader


def stack(layers: int, width: int) -> Task:
    """The linear layers of a transformer encoder, one after the other."""
    network = nn.Sequential()
    for _ in range(layers):
        for _ in ("q", "k", "v", "o"):
            network.append(nn.Linear(width, width, bias=False))
        network.append(nn.Linear(width, 4 * width, bias=False))
        network.append(nn.Linear(4 * width, width, bias=False))
    # signals keep their size: sums with denormal updates would take long
    for weight in network.parameters():
        nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return Task(network, width)


class Marks(Callback):
    """The times at which training begins and ends, and what the first save of the run takes."""

    began = ended = first_save = 0.0

    def __init__(self, path: Path) -> None:
        self.path = path

    # before ModelCheckpoint's, which is the last
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
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
            found = sorted(run[moment] for run in runs)
            passes, seconds = found[0]
            most_passes, _ = found[-1]
            case = f"{moment}, base of {size}"
            yield Row(
                case,
                "passes over the base",
                passes,
                goal,
                (passes, most_passes),
                {"s": seconds},
            )


def _moments(layers: int, width: int) -> dict[str, tuple[float, float]]:
    """Return each moment's passes over the base and seconds, less a plain Trainer's."""
    model = stack(layers, width)
    one_pass = _seconds_of_a_pass(model)
    ours = _fit(model, adapted=True)
    plain = _fit(stack(layers, width), adapted=False)
    moments = {}
    for moment, seconds in ours.items():
        extra = seconds - plain[moment]
        moments[moment] = (extra / one_pass, extra)
    return moments


def _seconds_of_a_pass(model: nn.Module) -> float:
    """How long one clone of all parameters takes: the shortest of three."""
    seconds = []
    for _ in range(3):
        seconds.append(
            _seconds(lambda: [p.detach().clone() for p in model.parameters()])
        )
    return min(seconds)


def _fit(model: Task, *, adapted: bool) -> dict[str, float]:
    """Time the moments of one fit, in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        marks = Marks(Path(folder) / "first.ckpt")
        keep = ModelCheckpoint(
            folder, filename="best", save_weights_only=True, every_n_train_steps=1
        )
        callbacks: list[Callback] = [marks, keep]
        if adapted:
            callbacks.insert(0, LoRACallback(r=8))
        trainer = Trainer(callbacks=callbacks, default_root_dir=folder, **QUIET)
        start = time.perf_counter()
        trainer.fit(model)
        found = {
            "set-up of fit": marks.began - start,
            "end of fit": time.perf_counter() - marks.ended,
        }
        # A plain Trainer's file would hold the base: its save is not measured, and its
        # test loads none.
        path = None
        found["first save"] = found["save"] = 0.0
        if adapted:
            path = keep.best_model_path
            found["first save"] = marks.first_save
            found["save"] = _seconds(
                lambda: trainer.save_checkpoint(Path(folder) / "a.ckpt")
            )
        found["validate"] = _seconds(lambda: trainer.validate(model, verbose=False))
        found["test a file"] = _seconds(
            lambda: trainer.test(model, ckpt_path=path, verbose=False)
        )
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
    yield Row(
        case, "bytes over adapters and their AdamW state", ours[0] / ours[1], 1.05
    )
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
    return size, 3 * bytes_of(trainable(task))  # AdamW keeps two values for each

"""A sweep of eight adapters, and eight fits of one adapter each."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRASweep
from tests.benchmarks.measure import Bench, Row, middle_half

WIDTH = 512
BATCHES = 40
LISTS = {"r": [4, 16], "lr_scale": [1, 2, 4, 8]}


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(6)])

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        loss = (self.layers(batch[0]) - batch[1]).square().mean()
        self.log("loss" if self.training else "val_loss", loss)
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def sweep(bench: Bench) -> Iterator[Row]:
    """LoRASweep over eight adapters, compared with eight fits, in processor time."""
    found = [_share_of_fits() for _ in range(bench.rounds)]
    yield Row(
        "8 adapters, 4 epochs",
        "processor time over 8 fits",
        median(found),
        0.6,
        middle_half(found),
    )


def _share_of_fits() -> float:
    """The time of a sweep over that of its adapters, each in a fit alone."""
    with tempfile.TemporaryDirectory() as folder:
        swept = LoRASweep(**LISTS, directory=folder)
        seconds = _seconds(lambda: swept.run(_fit))
    runs = swept.runs.values()
    alone = _seconds(lambda: [_fit(LoRACallback(**each)) for each in runs])
    return seconds / alone


def _fit(callback: Any, ckpt_path: str | None = None) -> None:
    data = DataLoader(TensorDataset(*torch.randn(2, 64 * BATCHES, WIDTH)), 64)
    quiet: Any = dict.fromkeys(
        (
            "logger",
            "enable_checkpointing",
            "enable_progress_bar",
            "enable_model_summary",
        ),
        False,
    )
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", callbacks=callback, **quiet)
    trainer.fit(Net(), data, data, ckpt_path=ckpt_path)


def _seconds(act: Callable[[], object]) -> float:
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        act()
    return time.process_time() - start

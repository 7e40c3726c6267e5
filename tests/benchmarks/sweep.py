"""A sweep of eight adapters, and eight fits of one adapter each."""

import contextlib
import io
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, LoRASweep
from tests.benchmarks.measure import Bench, Row, middle_half

WIDTH, BATCHES, LISTS = 512, 40, {"r": [4, 16], "lr_scale": [1, 2, 4, 8]}


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
    """LoRASweep over eight adapters, compared with eight fits, in the processor time of all threads."""
    alone = [LoRACallback(**arguments) for arguments in LoRASweep(**LISTS).runs.values()]
    found = [_seconds([LoRASweep(**LISTS)]) / _seconds(alone) for _ in range(bench.rounds)]
    yield Row("8 adapters, 4 validations", "processor time over 8 fits", median(found), 0.5, middle_half(found))


def _seconds(callbacks: list[Any]) -> float:
    data = DataLoader(TensorDataset(*torch.randn(2, 64 * BATCHES, WIDTH)), 64)
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    start = time.process_time()
    for callback in callbacks:
        with contextlib.redirect_stdout(io.StringIO()):
            L.Trainer(max_epochs=4, accelerator="cpu", callbacks=callback, **quiet).fit(Net(), data, data)
    return time.process_time() - start

"""How far a call travels through the package: ``python -m tests.benchmarks.trips [--most N]``.

For each public call on a model of three layers: how many calls it makes into this
package, of how many functions, in how many files. A trip that grows is one that a
reader has to follow further. Nothing is timed.
"""

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_lora
from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)

PACKAGE = f"{Path(lightning_lora.__file__).parent}/"


@dataclass
class Trip:
    """The calls into this package during one call of a user's."""

    calls: Counter[CodeType] = field(default_factory=Counter)

    @property
    def files(self) -> set[str]:
        """The files that these functions are in."""
        return {code.co_filename for code in self.calls}

    def most_called(self, count: int) -> list[tuple[str, int]]:
        """The functions that are called most often, and how often."""
        named = []
        for code, times in self.calls.most_common(count):
            file = code.co_filename.removeprefix(PACKAGE)
            named.append((f"{file}:{code.co_firstlineno} {code.co_name}", times))
        return named

    def note(self, frame: FrameType, event: str, _: Any) -> None:
        """Count a call, as ``sys.setprofile`` tells it."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            self.calls[code] += 1


def trip_of(call: Callable[[], object]) -> Trip:
    """Return the trip of a call."""
    trip = Trip()
    sys.setprofile(trip.note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return trip


def three_layers() -> nn.Module:
    """A plain model with three layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


class Module(L.LightningModule):
    """The three layers, with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = three_layers()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class FifthStep(L.Callback):
    """Follows the fifth step of a fit, from the end of the one before to its own end."""

    def __init__(self) -> None:
        self.trip = Trip()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        sys.setprofile(self.trip.note if trainer.global_step == 4 else None)


def fit(folder: Path, steps: int, *callbacks: L.Callback) -> None:
    """Fit the module without logger, files and tables."""
    data = TensorDataset(torch.zeros(8, 16), torch.zeros(8, 4))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[LoRACallback(r=2), *callbacks],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(data))


def trips_of_fits(folder: Path) -> dict[str, Trip]:
    """Follow a fit of one step, and a step in the middle of a longer one.

    Both have run before.
    """
    fifth = FifthStep()
    fit(folder, 6, fifth)
    return {
        "a fit of one step": trip_of(lambda: fit(folder, 1)),
        "a step in the middle": fifth.trip,
    }


def trips(folder: Path) -> dict[str, Trip]:
    """Make each call once, on a model that is as a user has it.

    All have run before: what is kept is warm.
    """
    config = LoRAConfig(r=2)
    file = folder / "adapter.safetensors"
    base = three_layers()
    adapted = deepcopy(base)
    inject_adapters(adapted, config)
    nn.init.ones_(adapted[0].lora_B)  # type: ignore[index,union-attr]
    save_adapter(adapted, file)
    load_adapter(deepcopy(base), file)
    plain = deepcopy(base)
    return {
        "load_adapter": trip_of(lambda: load_adapter(plain, file)),
        "save_adapter": trip_of(
            lambda: save_adapter(adapted, folder / "again.safetensors")
        ),
        "inject_adapters": trip_of(lambda: inject_adapters(deepcopy(base), config)),
        "merge_adapters": trip_of(lambda: merge_adapters(adapted)),
        "unmerge_adapters": trip_of(lambda: unmerge_adapters(adapted)),
    }


def main() -> None:
    """Print a table of all trips, and perhaps what is called most."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.trips", description=__doc__
    )
    parser.add_argument(
        "--most",
        type=int,
        default=0,
        metavar="N",
        help="show the N most called functions of each",
    )
    most = parser.parse_args().most
    with tempfile.TemporaryDirectory() as folder:
        found = trips(Path(folder)) | trips_of_fits(Path(folder))
    table = Table("call", "calls", "functions", "files")
    for name, trip in found.items():
        table.add_row(
            name, str(trip.calls.total()), str(len(trip.calls)), str(len(trip.files))
        )
    console = Console()
    console.print(table)
    for name, trip in found.items():
        for place, times in trip.most_called(most):
            console.print(f"{name}: {times:5} {place}", highlight=False)


if __name__ == "__main__":
    main()

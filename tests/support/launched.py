"""A fit in one of the processes that a launcher has started.

Usage: python -m tests.support.launched FOLDER [--strategy NAME] [--devices N] [--nodes
N] [--requeue]
"""

import argparse
import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.support.models import LitTiny, data, lora, state, trainer
from tests.support.train import LeaveTheGroup

LIMIT = 180
"""Seconds after which a process that waits for another one ends, and says where it waited."""

Make = Callable[[list[L.Callback]], L.Trainer]
"""Makes a launcher's Trainer with these callbacks."""


class Requeue(L.Callback):
    """Stop this process after the first epoch, as SLURM does: first the signal, then the end."""

    def on_train_epoch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.current_epoch == 0:
            signal.raise_signal(signal.SIGUSR1)
            os._exit(0)


def fit(make: Make, folder: Path, name: str, ckpt_path: Path | None = None) -> None:
    """Train until the second epoch, and write the merged weights."""
    L.seed_everything(7, verbose=False)
    model = LitTiny()
    files = ModelCheckpoint(folder / name, filename="{epoch}", save_top_k=-1)
    t = make([lora(dropout=0.3), files, LeaveTheGroup()])
    t.fit(model, data(), ckpt_path=ckpt_path)
    if t.is_global_zero:
        torch.save(state(model), folder / f"{name}.pt")


def fit_and_resume(make: Make, folder: Path) -> None:
    """Train two epochs, and the second one again from the first one's file."""
    fit(make, folder, "through")
    fit(make, folder, "resumed", folder / "through" / "epoch=0.ckpt")


def main(*argv: str) -> None:
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--strategy", default="ddp")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--requeue", action="store_true")
    arguments = parser.parse_args(argv or None)

    def make(callbacks: list[L.Callback]) -> L.Trainer:
        return trainer(
            arguments.folder,
            [*callbacks, Requeue()] if arguments.requeue else callbacks,
            strategy=arguments.strategy,
            devices=arguments.devices,
            num_nodes=arguments.nodes,
        )

    if arguments.requeue:
        fit(make, arguments.folder, "through")
    else:
        fit_and_resume(make, arguments.folder)


if __name__ == "__main__":
    main()

"""A training run in its own process, for tests that kill, spawn and resume.

It writes FOLDER/result.pt: the module's state after fit, and what tests of the best file give.
"""

import argparse
import atexit
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRACallback
from tests.support.models import LitTiny, data, state, trainer
from tests.support.versions import keeps_random


class KillAt(L.Callback):
    """Kill the process without warning, as an out-of-memory killer does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class LeaveTheGroup(L.Callback):
    """End gloo's threads before the process ends.

    Lightning leaves them running, and then some spawned processes abort.
    """

    def setup(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())


class Tied(LitTiny):
    """A module whose adapted q_proj shares its weight with an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(8, 8, bias=False)
        self.twin.weight = self.q_proj.weight


class Wide(LitTiny):
    """A module that cannot be pickled, and whose data does not fit into a pipe's buffer."""

    def __init__(self) -> None:
        super().__init__(width=256)
        self.double = lambda x: 2 * x


def main(*argv: str) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("strategy")
    parser.add_argument("devices", type=int)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--merge", default="last")
    parser.add_argument("--module", default="LitTiny")
    parser.add_argument("--test", action="store_true")
    arguments = parser.parse_args(argv)

    L.seed_everything(7, verbose=False)
    model = {module.__name__: module for module in (LitTiny, Tied, Wide)}[arguments.module]()
    checkpoint = ModelCheckpoint(arguments.folder, monitor="val_loss", filename="{epoch}", save_top_k=-1)
    merge: Any = False if arguments.merge == "none" else arguments.merge
    dropout = 0.3 if keeps_random else 0.0
    adapters = LoRACallback(r=2, modules_to_save=["head"], merge=merge, dropout=dropout)
    callbacks = [adapters, checkpoint, LeaveTheGroup(), *([KillAt(arguments.kill_at)] if arguments.kill_at else [])]
    strategy = "auto" if arguments.strategy == "single" else arguments.strategy
    t = trainer(arguments.folder, callbacks, strategy=strategy, devices=arguments.devices, max_epochs=4)
    resume = max(arguments.folder.glob("epoch=*.ckpt"), key=lambda path: path.name) if arguments.resume else None
    t.fit(model, data(), data(), ckpt_path=resume)

    result: dict[str, Any] = {"state": state(model), "val_loss": float(t.callback_metrics["val_loss"])}
    result["classes"] = [type(module).__name__ for module in model.modules()]
    t.save_checkpoint(arguments.folder / "after.ckpt")
    if arguments.test:
        result["tested"] = t.test(model, data(), ckpt_path="best", verbose=False)[0]["test_loss"]
        t.save_checkpoint(arguments.folder / "again.ckpt")
    result["best"] = checkpoint.best_model_path
    if t.global_rank == 0:
        torch.save(result, arguments.folder / "result.pt")

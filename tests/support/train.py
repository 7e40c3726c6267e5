"""A training run in its own process, for tests that kill, spawn and resume.

It writes result.pt: the module's state after fit, and what tests of the best file give.
"""

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

from tests.support.models import LitTiny, data, lora, state, trainer
from tests.support.versions import keeps_random


class KillAt(L.Callback):
    """Kill the process without warning, as an out-of-memory killer does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if (
            trainer.global_step == self.step
            and trainer.global_rank == trainer.world_size - 1
        ):
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


def run(
    folder: Path,
    strategy: str,
    *,
    module: type[LitTiny] = LitTiny,
    merge: Any = "last",
    kill_at: int = 0,
    resumes: bool = False,
    tests: bool = False,
) -> None:
    L.seed_everything(7, verbose=False)
    model = module()
    checkpoint = ModelCheckpoint(
        folder, monitor="val_loss", filename="{epoch}", save_top_k=-1
    )
    adapters = lora(merge=merge, dropout=0.3 if keeps_random else 0.0)
    callbacks = [
        adapters,
        checkpoint,
        LeaveTheGroup(),
        *([KillAt(kill_at)] if kill_at else []),
    ]
    t = trainer(folder, callbacks, strategy=strategy, devices=2, max_epochs=4)
    last = (
        max(folder.glob("epoch=*.ckpt"), key=lambda path: path.name)
        if resumes
        else None
    )
    t.fit(model, data(), data(), ckpt_path=last)

    result: dict[str, Any] = {"state": state(model), "best": checkpoint.best_model_path}
    result["classes"] = [type(module).__name__ for module in model.modules()]
    t.save_checkpoint(folder / "after.ckpt")
    if tests:
        result["tested"] = t.test(model, data(), ckpt_path="best", verbose=False)[0][
            "test_loss"
        ]
        t.save_checkpoint(folder / "again.ckpt")
    if t.global_rank == 0:
        torch.save(result, folder / "result.pt")

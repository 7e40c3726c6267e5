"""Fits of a small transformer in two processes or more, and comparisons of what they give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_lora import LoRAError, load_adapter
from tests.support.cases import equal, leaves
from tests.support.parameters import values_of
from tests.support.ranks import run_ranks
from tests.support.sharded import LitNet, data, lora, trainer_of, whole_state

State = dict[str, Tensor]


class Saves(L.Callback):
    """Writes a file at the end of each epoch, as the user's code may: on every process.

    It keeps copies in the file.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.kind = kind

    def on_train_epoch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        trainer.save_checkpoint(path_of(self.folder, self.kind, trainer.current_epoch))

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        checkpoint["kept"] = values_of(pl_module)


def path_of(folder: Path, kind: str, epoch: int) -> Path:
    return folder / f"{kind}-{epoch}.ckpt"


def fit(
    kind: str,
    folder: Path,
    build: Callable[[], LitNet] = LitNet,
    kwargs: dict[str, Any] | None = None,
    path: Path | None = None,
    *,
    train: Callable[[], Any] = data,
    **options: Any,
) -> State:
    """Fit with ``callback``, or one of these ``kwargs``, a file after each epoch, and options of the Trainer."""
    L.seed_everything(1, verbose=False)  # the samplers' seed
    module = build()
    torch.manual_seed(1 if path is None else 99)
    callbacks = [
        *options.pop("callbacks", []),
        options.pop("callback", None) or lora(**kwargs or {}),
    ]
    callbacks.append(Saves(folder, kind))
    t = trainer_of(kind, folder, callbacks, **options)
    t.fit(module, train(), data(), ckpt_path=path, weights_only=True)
    return whole_state(module)


def fit_in_processes(
    kind: str, folder: Path, *args: Any, **options: Any
) -> list[State]:
    return run_ranks(
        fit, kind, folder, *args, size=options.get("devices", 2), **options
    )


def built(path: Path) -> LitNet:
    """A module on one process with the adapters of a file."""
    module = LitNet()
    module.model = module.built()
    load_adapter(module, path)
    return module


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert not [
        name for name, value in expected.items() if not equal(value, found[name])
    ]


def read(path: Path) -> dict[str, Any]:
    """The leaves of a checkpoint, by path."""
    return leaves(torch.load(path, weights_only=True))


def differing(found: Path, expected: Path, part: str = "") -> list[str]:
    """The leaves of two files that are not the same to the bit, among those with this in their names."""
    ours = read(found)
    theirs = read(expected)
    assert part or ours.keys() == theirs.keys()
    return [
        name
        for name, value in theirs.items()
        if part in name and not equal(value, ours[name])
    ]


def message_of(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The class and the text of the error, if there is one."""
    try:
        call(*args, **kwargs)
    except LoRAError as found:
        return f"{type(found).__name__}: {found}"
    return ""

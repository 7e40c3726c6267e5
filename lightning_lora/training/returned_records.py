"""How a merged module's record comes back from processes that were spawned or forked.

Lightning sends the main process a state dict, and what its launcher adds. Here, that is
the path of a file that only this user can read.
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partialmethod
from io import BytesIO
from pathlib import Path
from pickle import Pickler, Unpickler
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_lora.base.record import Record
from lightning_lora.errors import warn
from lightning_lora.model.records import find_record, keep_record
from lightning_lora.private import START_METHOD, multiprocessing_launchers

_KEY = "lightning_lora"  # our entry in the results
_FILE = "record.pt"


def returns_state_only(trainer: Trainer) -> bool:
    """Whether the strategy's processes send back only a state dict."""
    return getattr(trainer.strategy, START_METHOD, "popen") != "popen"


def extend_launchers() -> None:
    """Let Lightning's launchers carry records.

    No callback's hook runs in the main process, which gets them.
    """
    for launcher in multiprocessing_launchers():
        # a partialmethod is ours: an earlier callback has set it
        if not isinstance(vars(launcher)["get_extra_results"], partialmethod):
            launcher.get_extra_results = partialmethod(
                _send, launcher.get_extra_results
            )
            launcher.update_main_process_results = partialmethod(
                _receive, launcher.update_main_process_results
            )


def _send(
    launcher: Any, get_extra_results: Callable[..., dict[str, Any]], trainer: Trainer
) -> dict[str, Any]:
    """Add the path of a merged module's record to a launcher's results: a pipe takes no large ones."""
    results = get_extra_results(launcher, trainer)
    record = find_record(trainer.lightning_module)
    if trainer.state.fn != "fit" or record is None or not record.state.is_merged:
        return results
    try:
        return {**results, _KEY: _write(record)}
    except Exception as error:
        warn(
            "The fit is complete, and the main process gets the merged weights, but "
            f"not the adapters and the base ({type(error).__name__}: {error}). These "
            "are in checkpoints. If space is missing, free some, or set TMPDIR to a "
            "folder that can be written."
        )
        return results


def _receive(
    launcher: Any,
    update_results: Callable[..., None],
    trainer: Trainer,
    results: dict[str, Any],
) -> None:
    """Give the module the record of its merged weights."""
    update_results(launcher, trainer, results)
    if _KEY not in results:
        return
    pl_module = trainer.lightning_module
    keep_record(pl_module, _read_and_remove(results[_KEY]))
    rank_zero_info(
        f"{type(pl_module).__name__} has the weights that a fit in other processes "
        "merged: it gets its base and its adapters back. (To use these weights as a "
        "new base, call remove_adapters on it first.)"
    )


# The file


def _write(record: Record) -> str:
    """Write a record into a new folder, and return its path.

    After an error, there is none.
    """
    # mkdtemp makes a folder that no other user may read or write
    folder = tempfile.mkdtemp(prefix="lightning_lora_")
    try:
        file = BytesIO()
        tensors: list[Tensor] = []
        _Pickler(file, tensors).dump(record)
        torch.save((file.getvalue(), tensors), Path(folder) / _FILE)
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _read_and_remove(folder: str) -> Any:
    """Read a record, and remove its folder."""
    contents, tensors = torch.load(
        Path(folder) / _FILE, map_location="cpu", weights_only=True
    )
    shutil.rmtree(folder)
    return _Unpickler(BytesIO(contents), tensors).load()


class _Pickler(Pickler):
    """Leaves tensors to torch, which reads them onto a CPU."""

    def __init__(self, file: BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpickler(Unpickler):
    """Takes the tensors that torch has read."""

    def __init__(self, file: BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self.tensors[number]

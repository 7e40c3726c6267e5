"""A fit in spawned or forked processes: the main process gets the record of what they merged.

Lightning sends back a state dict, and what its launcher adds: here, the path of a file that only this user can read.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_lora.errors import AdapterStateError, warn
from lightning_lora.layers import Adapter, kind_named, name_of_kind
from lightning_lora.model.record import Record, find_record, forget_record, keep_record
from lightning_lora.private import multiprocessing_launchers, start_method

_KEY = "lightning_lora"  # our entry in the results


def returns_state_only(trainer: Trainer) -> bool:
    """Whether the strategy's processes send back only a state dict."""
    return start_method(trainer.strategy) != "popen"


def extend_launchers() -> None:
    """Let Lightning's launchers carry records, in the processes that they start and in this one."""
    for launcher in multiprocessing_launchers():
        _extend(launcher)


def _extend(launcher: Any) -> None:
    """Add to both ends of a launcher's results, once. No callback's hook runs in the main process."""
    collect, restore = launcher.get_extra_results, launcher.update_main_process_results
    if collect.__module__ == __name__:
        return

    @wraps(collect, assigned=("__doc__", "__name__"))
    def get_extra_results(self: Any, trainer: Trainer) -> dict[str, Any]:
        return {**collect(self, trainer), **_sent(trainer)}

    @wraps(restore, assigned=("__doc__", "__name__"))
    def update_main_process_results(self: Any, trainer: Trainer, extra: dict[str, Any]) -> None:
        folder = extra.pop(_KEY, None)
        restore(self, trainer, extra)
        if folder is not None:
            _receive(trainer.lightning_module, folder)

    launcher.get_extra_results = get_extra_results
    launcher.update_main_process_results = update_main_process_results


def _sent(trainer: Trainer) -> dict[str, str]:
    """Write the record of a merged module for the main process, and return the path: a pipe takes no large results."""
    record = find_record(trainer.lightning_module)
    if trainer.state.fn != "fit" or record is None or not record.is_merged:
        return {}
    try:
        folder = tempfile.mkdtemp(prefix="lightning_lora_")  # which no other user may read or write
        try:
            torch.save(_with_kinds(record, name_of_kind), Path(folder) / "record.pt")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except Exception as error:
        _warn_of_loss(error)
        return {}
    return {_KEY: folder}


def _receive(pl_module: LightningModule, folder: str) -> None:
    """Give a module the record of its merged weights."""
    try:
        sent = torch.load(Path(folder) / "record.pt", map_location="cpu", weights_only=False)
        record = _with_kinds(sent, _kind_named)
    except Exception as error:
        _warn_of_loss(error)
        forget_record(pl_module)  # which is of earlier weights
        return
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    keep_record(pl_module, record)
    rank_zero_info(
        f"{type(pl_module).__name__} has the weights that a fit in other processes merged: it gets its base and its "
        "adapters back. (To use these weights as a new base, call remove_adapters on it first.)"
    )


def _with_kinds(record: Record, kind_of: Callable[[Any], Any]) -> Record:
    """Return a record with other values for the classes of its adapters: a class cannot be sent, but its name can."""

    def changed(adapters: Mapping[str, Adapter]) -> dict[str, Adapter]:
        return {name: replace(adapter, kind=kind_of(adapter.kind)) for name, adapter in adapters.items()}

    assert record.merge is not None
    others = {name: replace(other, resting=changed(other.resting)) for name, other in record.others.items()}
    return replace(record, others=others, merge=replace(record.merge, adapters=changed(record.merged)))


def _kind_named(name: str) -> type:
    kind = kind_named(name)
    if kind is None:
        raise AdapterStateError(
            f"the adapters are of the class {name}, which is not known here: call register_adapter in the main program "
            "too, before fit"
        )
    return kind


def _warn_of_loss(error: Exception) -> None:
    warn(
        "The fit is complete, and the main process gets the merged weights, but not the adapters and the base "
        f"({type(error).__name__}: {error}). There, the model has no adapters: it cannot be unmerged or saved as "
        "adapters, and another fit takes the merged weights as a new base. Load the adapters from a checkpoint. "
        "If space is missing, free some, or set TMPDIR to a folder that can be written."
    )

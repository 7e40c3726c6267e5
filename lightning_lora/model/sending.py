"""Send a model's record from a worker process to the main process: spawning strategies return only a state dict.

A worker stores the record in a temporary folder of the program. The main process finds it there by the digests of the
merged weights. Only the program's user may read the folder or write to it, and it is checked before each use. Reading
runs no code.
"""

import copy
import multiprocessing
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import util
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from lightning_lora.errors import AdapterStateError, warn
from lightning_lora.layers import Adapter, kind_named, name_of_kind
from lightning_lora.tensors.digests import digest
from lightning_lora.tensors.names import named_parameters

_FOLDER = "LIGHTNING_LORA_MEMORY"  # the environment variable with the folder's path, which worker processes inherit

_MADE: dict[Path, int] = {}  # by which process each folder was made: a fork has its parent's entries
_ALLOWED: list[Any] = []  # the classes of which a record consists: torch reads no others


def allow(*classes: type) -> None:
    """Allow objects of these classes in a record. Reading one sets its attributes, and calls nothing of it."""
    _ALLOWED.extend(classes)


def make_folder() -> None:
    """Make the program's temporary folder, until this process ends. A worker uses that of its program."""
    folder = _folder()
    if folder and (_is_owner(folder) or multiprocessing.parent_process()):
        return
    os.environ.pop(_FOLDER, None)  # of another program, which started this one
    try:
        folder = Path(tempfile.mkdtemp(prefix="lightning_lora_"))
    except OSError:  # most fits need no folder: the others give a warning
        return
    _MADE[folder] = os.getpid()
    util.Finalize(None, _delete, args=(folder,), exitpriority=-100)  # at exit, in forked workers too
    os.environ[_FOLDER] = str(folder)


def _folder() -> Path | None:
    """The folder, if it exists and no other user could have put anything into it."""
    folder = Path(os.environ.get(_FOLDER) or os.devnull)
    try:
        found = folder.lstat()
    except OSError:
        return None
    is_ours = os.name != "posix" or (found.st_uid == os.geteuid() and not found.st_mode & 0o077)
    return folder if stat.S_ISDIR(found.st_mode) and is_ours else None


def _is_owner(folder: Path) -> bool:
    return _MADE.get(folder) == os.getpid()


def _delete(folder: Path) -> None:
    if _is_owner(folder):
        shutil.rmtree(folder, ignore_errors=True)


def send(record: object, weights: Mapping[str, int]) -> None:
    """Store the record of a model with these merged weights (their digests by name), or warn if that fails."""
    try:
        folder = _folder()
        if folder is None:
            raise FileNotFoundError("there is no temporary folder that only this user can write to")
        name = f"{time.time_ns():020}_{uuid4().hex}"
        unfinished = folder / f"{name}.part"
        try:
            torch.save({"weights": dict(weights), "record": record}, unfinished)
            _load(unfinished)
            unfinished.replace(folder / f"{name}.pt")
        finally:
            unfinished.unlink(missing_ok=True)
    except Exception as error:
        warn(
            f"The fit is complete, and the main process gets the merged weights, but not the adapters and the base "
            f"({type(error).__name__}: {error}). There, the model has no adapters: it cannot be unmerged or saved as "
            "adapters, and another fit takes the merged weights as a new base. Load the adapters from a checkpoint. "
            "For the next time, free space, or set TMPDIR to a folder that can be written."
        )


def _load(path: Path, *, mmap: bool = True) -> dict[str, Any]:
    """Read an entry. With ``mmap``, the tensors stay in the file."""
    with torch.serialization.safe_globals(_ALLOWED):
        entry: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return entry


def without_classes(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Return adapters with the names of their classes: a class cannot be sent."""
    sent: dict[str, Any] = {name: copy.copy(adapter) for name, adapter in adapters.items()}
    for adapter in sent.values():
        adapter.kind = name_of_kind(adapter.kind)
    return sent


def with_classes(adapters: Mapping[str, Any]) -> None:
    """Give adapters that were sent their classes back."""
    for adapter in adapters.values():
        name = adapter.kind
        adapter.kind = kind_named(name)
        if adapter.kind is None:
            raise AdapterStateError(
                f"The weights of this model were merged in another process, with adapters of the class {name}, which "
                "is not known here. Call register_adapter in the main program too, before fit."
            )


def receive(model: nn.Module, build: Callable[[Any], Any]) -> Any:
    """Return the record that was sent for this model's weights, as ``build`` makes it, or None."""
    for path in _about(model):
        record = build(_load(path, mmap=False)["record"])
        if _is_owner(path.parent):  # worker processes leave it to the main process
            path.unlink(missing_ok=True)
        return record
    return None


def delete_sent(model: nn.Module) -> None:
    """Delete the records that were sent for this model's weights."""
    for path in _about(model):
        path.unlink(missing_ok=True)


def _about(model: nn.Module) -> Iterator[Path]:
    """The files about this model's weights, the newest first."""
    folder = _folder()
    paths = sorted(folder.glob("*.pt"), reverse=True) if folder else []
    parameters = named_parameters(model, remove_duplicate=False) if paths else {}
    for path in paths:
        try:
            weights = _load(path)["weights"]
        except FileNotFoundError:  # another process was faster
            continue
        except Exception as error:
            warn(f"{path} cannot be read, and is skipped ({type(error).__name__}).")
            continue
        found = {name: parameters[name] for name in weights if name in parameters and not parameters[name].is_meta}
        if len(found) == len(weights) and all(digest(parameter) == weights[name] for name, parameter in found.items()):
            yield path

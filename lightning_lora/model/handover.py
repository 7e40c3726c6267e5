"""Pass a model's record to the main process.

Strategies that spawn or fork processes send back only a state dict, and call no hook when it arrives. It contains the
merged weights. A worker process stores the record, with the exact base and the adapters, in a temporary folder. The
main process finds it there by the digests of the merged weights.
"""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from lightning_lora.tensors.names import named_parameters
from lightning_lora.tensors.values import digest

_FOLDER = "LIGHTNING_LORA_MEMORY"
"""The environment variable with the folder's path, which all processes of a program share."""


def name_folder() -> None:
    """Choose the path of the temporary folder.

    Call it before any process starts. The folder is deleted when this process ends.
    """
    if _FOLDER not in os.environ:
        os.environ[_FOLDER] = str(Path(tempfile.gettempdir()) / f"lightning_lora_{uuid4().hex}")
        atexit.register(shutil.rmtree, os.environ[_FOLDER], ignore_errors=True)


def leave(record: object, weights: Mapping[str, int]) -> None:
    """Store a model's record in the temporary folder.

    Args:
        record: The record.
        weights: Digests of the model's parameters, by name.
    """
    folder, name = Path(os.environ[_FOLDER]), uuid4().hex
    folder.mkdir(mode=0o700, exist_ok=True)
    torch.save(record, folder / f"{name}.pt")
    (folder / f"{name}.json").write_text(json.dumps(dict(weights)))


def recall(model: nn.Module) -> Any:
    """Return the stored record for this model's weights, or None."""
    for digests in _about(model):
        return torch.load(digests.with_suffix(".pt"), weights_only=False)  # safe: this program wrote the file
    return None


def forget(model: nn.Module) -> None:
    """Delete the stored records for this model's weights."""
    for digests in _about(model):
        digests.unlink()
        digests.with_suffix(".pt").unlink()


def _about(model: nn.Module) -> Iterator[Path]:
    for digests in list(Path(os.environ.get(_FOLDER, os.devnull)).glob("*.json")):
        if _has_weights(model, json.loads(digests.read_text())):
            yield digests


def _has_weights(model: nn.Module, digests: Mapping[str, int]) -> bool:
    """Whether the parameters of ``model`` have these digests."""
    parameters = named_parameters(model, remove_duplicate=False)
    return all(name in parameters and digest(parameters[name]) == digests[name] for name in digests)

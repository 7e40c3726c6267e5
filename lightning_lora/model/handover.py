"""What a fit in other processes remembers of a model, left in a temporary folder and found by the model's weights.

Strategies that spawn or fork send back a state dict alone, and no hook is called when it arrives. So merged weights
come home by themselves, and the memory of the exact base, which later stages need, is looked up when it is needed.
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
"""The variable of the environment that tells every process of a program in which folder memories are left."""


def name_memory() -> None:
    """Name the folder of memories, before any process starts; it goes when this one ends."""
    if _FOLDER not in os.environ:
        os.environ[_FOLDER] = str(Path(tempfile.gettempdir()) / f"lightning_lora_{uuid4().hex}")
        atexit.register(shutil.rmtree, os.environ[_FOLDER], ignore_errors=True)


def leave_memory(memory: object, weights: Mapping[str, int]) -> None:
    """Leave what is remembered of the model whose parameters have these digests."""
    folder, name = Path(os.environ[_FOLDER]), uuid4().hex
    folder.mkdir(mode=0o700, exist_ok=True)
    torch.save(memory, folder / f"{name}.pt")
    (folder / f"{name}.json").write_text(json.dumps(dict(weights)))


def recall(model: nn.Module) -> Any:
    """Return what was left about a model with the very weights of this one, or None."""
    for digests in _about(model):
        return torch.load(digests.with_suffix(".pt"), weights_only=False)  # our own program wrote it
    return None


def forget(model: nn.Module) -> None:
    """Delete what was left about the weights of this model."""
    for digests in _about(model):
        digests.unlink()
        digests.with_suffix(".pt").unlink()


def _about(model: nn.Module) -> Iterator[Path]:
    for digests in list(Path(os.environ.get(_FOLDER, os.devnull)).glob("*.json")):
        if shows(model, json.loads(digests.read_text())):
            yield digests


def shows(model: nn.Module, digests: Mapping[str, int]) -> bool:
    """Whether these parameters of ``model`` have these digests."""
    parameters = named_parameters(model, remove_duplicate=False)
    return all(name in parameters and digest(parameters[name]) == digests[name] for name in digests)

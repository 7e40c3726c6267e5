"""A trained model, and what must refuse to change it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_lora import LoRAConfig, load_adapter, save_adapter
from lightning_lora.storage.beside_adapters import SHOWN
from lightning_lora.storage.checksum import checksum
from lightning_lora.storage.stored import KEY
from lightning_lora.tensors.dicts import without
from tests.support.cases import held
from tests.support.faults import unchanged
from tests.support.models import LitTiny, as_trained, data, lora, same, state, trainer

CONFIG = LoRAConfig(
    r=2,
    alpha=4,
    target_modules=["q_proj", "v_proj"],
    modules_to_save=["head"],
    bias="lora_only",
)


class Holds(LitTiny):
    """A module with what frameworks put into hyperparameters."""

    def __init__(self, **extra: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


@torch.no_grad()
def trained() -> LitTiny:
    """A model with every kind of thing that training changes."""
    model: LitTiny = as_trained(LitTiny(), **CONFIG.to_dict())
    model.head.weight.add_(1)
    model.q_proj.bias.add_(1)
    return model


@contextmanager
def refused(model: nn.Module, error: type[Exception], match: str) -> Iterator[None]:
    """Expect an error, and the model exactly as it was."""
    with unchanged(model), pytest.raises(error, match=match):
        yield


def restores(file: Any, model: Any, onto: Any = None) -> Any:
    """A plain base, of which a file makes what ``model`` is, bit for bit."""
    onto = LitTiny() if onto is None else onto
    load_adapter(onto, file)
    assert same(state(onto), state(model))
    return onto


def saved(file: Path, model: Any, **config: Any) -> Any:
    """The same model, with adapters that are as if trained, and their file."""
    save_adapter(as_trained(model, **config), file)
    return model


def fitted(
    file: Path,
    model: Any = None,
    *callbacks: L.Callback,
    plain: bool = False,
    **options: Any,
) -> Any:
    """A model after a fit, whose Trainer wrote a file: with adapters, unless it is ``plain``."""
    weights_only = options.pop("weights_only", False)
    model = model or LitTiny()
    used = [] if plain else list(callbacks) or [lora(merge=False)]
    t = trainer(
        file.parent, used, **{"max_epochs": 1, "enable_checkpointing": False} | options
    )
    t.fit(model, data())
    t.save_checkpoint(file, weights_only=weights_only)
    return model


def goes_on(
    file: Any, model: Any = None, callback: L.Callback | None = None, **options: Any
) -> None:
    """Expect a run of one epoch to go on from its file for one more."""
    t = trainer(
        ".", [callback or lora(merge=False)], max_epochs=2, enable_checkpointing=False
    )
    t.fit(model or LitTiny(), data(), data(), ckpt_path=file, **options)
    assert t.global_step == 8


def set_checksum(checkpoint: dict[str, Any]) -> None:
    """Give a checkpoint that was changed the checksum of what it holds now."""
    about = without(checkpoint[KEY], [SHOWN])
    checkpoint[KEY]["checksum"] = checksum(held(checkpoint), about)


def rewrite(
    path: Path,
    change: Callable[[dict[str, Any], dict[str, Any]], object],
    *,
    checked: bool = True,
) -> Path:
    """Change what an adapter file says and holds, with the right checksum unless it says otherwise."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()[KEY])
    tensors = load_file(path)
    change(about, tensors)
    if checked:
        about |= {"entries": len(tensors)}
        about["checksum"] = checksum(tensors, about)
    save_file(tensors, path, {"format": "pt", KEY: json.dumps(about)})
    return path

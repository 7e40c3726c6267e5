"""What tests of several rooms run: callbacks, errors, models."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path
from transformers.pytorch_utils import Conv1D

from lightning_lora import adapter_state_dict, unmerge_adapters
from lightning_lora.storage.state import without_hints
from tests.support.models import TRAINED, WIDTH, WORDS, LitTiny, as_trained
from tests.support.parameters import cloned


class At(L.Callback):
    """Do something at the start of a given training batch."""

    def __init__(
        self, batch: int, action: Callable[[L.Trainer, L.LightningModule], Any]
    ) -> None:
        self.batch = batch
        self.action = action

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        if trainer.global_step == self.batch:
            self.action(trainer, pl_module)


class StopError(RuntimeError):
    pass


def stop(*_: Any) -> None:
    raise StopError


def held(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state, without the hint to other readers."""
    return without_hints(checkpoint["state_dict"])


def tensors(path: Any) -> list[str]:
    """Names in a checkpoint's state."""
    return list(held(torch.load(path, weights_only=True)))


class Three(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.conv = Conv1D(WIDTH, WIDTH)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, index: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.linear(self.embed(index))))


def three(**kwargs: Any) -> Three:
    return as_trained(Three(), scale=0.3, target_modules="all", **kwargs)


FROZEN = ("embed.weight", "q_proj.weight", "q_proj.bias", "v_proj.weight")


def leaves(value: Any) -> dict[str, Any]:
    """What is in a nested structure, by the keys that lead to it."""
    return {keystr(keys): leaf for keys, leaf in tree_flatten_with_path(value)[0]}


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def files_hold_adapters_alone(folder: Path) -> bool:
    """Whether no file below ``folder`` holds a frozen weight anywhere, by its name or its shape."""
    files = sorted(folder.rglob("*.ckpt"))
    for file in files:
        assert_holds_adapters_alone(file)
    return bool(files)


def assert_holds_adapters_alone(file: Path) -> None:
    """Expect no frozen weight anywhere in a file."""
    checkpoint = torch.load(file, weights_only=True)
    assert set(held(checkpoint)) == set(TRAINED), file
    assert "lightning_lora" in checkpoint, file
    base = LitTiny()
    frozen_shapes = {base.get_parameter(name).shape for name in FROZEN}
    # which gives numbers by name
    for path, value in leaves({**checkpoint, "lightning_lora": None}).items():
        if value is not None:
            assert frozen_names_in(path) == [], file
        if isinstance(value, Tensor):
            assert value.shape not in frozen_shapes, (file, path)
            assert value.untyped_storage().nbytes() == value.nbytes, (file, path)


def file_names(folder: Path, pattern: str = "*") -> list[str]:
    """The names in a folder that are like a pattern, in order."""
    return sorted(path.name for path in folder.glob(pattern))


def frozen_names_in(path: str) -> list[str]:
    return [name for name in FROZEN if name in path]


def same_parts(a: Any, b: Any) -> bool:
    """Whether two nested structures have the same keys, bits and values."""
    leaves_of_a, structure_of_a = tree_flatten(a)
    leaves_of_b, structure_of_b = tree_flatten(b)
    if structure_of_a != structure_of_b:
        return False
    return all(
        equal(one, other) for one, other in zip(leaves_of_a, leaves_of_b, strict=True)
    )


def base_is_whole(model: LitTiny) -> bool:
    """Whether every frozen weight of ``model``, which ends un-merged, has the bits that it was born with."""
    unmerge_adapters(model)
    base = LitTiny()
    changed = [
        name
        for name in FROZEN
        if not torch.equal(model.get_parameter(name), base.get_parameter(name))
    ]
    return changed == []


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what trains."""
    return cloned(adapter_state_dict(model))

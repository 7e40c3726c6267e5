"""What tests of several rooms run: callbacks, errors, models."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, adapter_state_dict, inject_adapters, unmerge_adapters
from lightning_lora.storage.state import NOTE
from tests.support.models import TRAINED, WIDTH, WORDS, LitTiny, randomise


class At(L.Callback):
    """Do something at the start of a given training batch."""

    def __init__(self, batch: int, action: Callable[[L.Trainer, L.LightningModule], Any]) -> None:
        self.batch, self.action = batch, action

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.batch:
            self.action(trainer, pl_module)


class StopError(RuntimeError):
    pass


def stop(*_: Any) -> None:
    raise StopError


def held(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's state, without the note to other readers."""
    return {name: value for name, value in checkpoint["state_dict"].items() if name != NOTE}


def tensors(path: Any) -> list[str]:
    """Names in a checkpoint's state."""
    return list(held(torch.load(path, weights_only=True)))


class Three(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, index: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.linear(self.embed(index))))


def three(**kwargs: Any) -> Three:
    model = Three()
    inject_adapters(model, LoRAConfig(r=2, target_modules="all", **kwargs))
    randomise(model, scale=0.3)
    return model


FROZEN = ("embed.weight", "q_proj.weight", "q_proj.bias", "v_proj.weight")


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Everything in a nested structure, with the keys that lead to it."""
    yield path, value
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield from parts(each, f"{path}/{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, each in enumerate(value):
            yield from parts(each, f"{path}/{number}")


def files_hold_adapters_alone(folder: Path) -> bool:
    """Whether no file below ``folder`` holds a frozen weight anywhere, by its name or its shape."""
    files = sorted(folder.rglob("*.ckpt"))
    shapes = {tuple(LitTiny().state_dict()[name].shape) for name in FROZEN}
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert set(held(checkpoint)) == set(TRAINED) and "lightning_lora" in checkpoint, file
        for path, value in parts({**checkpoint, "lightning_lora": None}):  # the description gives numbers by name
            assert value is None or not path.endswith(FROZEN), (file, path)
            if isinstance(value, Tensor):
                assert tuple(value.shape) not in shapes, (file, path)
                assert value.untyped_storage().nbytes() == value.nbytes, (file, path)
    return bool(files)


def same_parts(a: Any, b: Any) -> bool:
    """Whether two nested structures have the same keys, bits and values."""
    ours, theirs = dict(parts(a)), dict(parts(b))
    equal = {key: torch.equal(x, theirs[key]) for key, x in ours.items() if isinstance(x, Tensor)}
    plain = [key for key, x in ours.items() if not isinstance(x, Tensor | Mapping | Sequence) or isinstance(x, str)]
    return list(ours) == list(theirs) and all(equal.values()) and all(ours[key] == theirs[key] for key in plain)


def base_is_whole(model: LitTiny) -> bool:
    """Whether every frozen weight of ``model``, which ends un-merged, has the bits that it was born with."""
    unmerge_adapters(model)
    return all(torch.equal(model.get_parameter(name), LitTiny().get_parameter(name)) for name in FROZEN)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """A copy of what trains."""
    return {name: value.clone() for name, value in adapter_state_dict(model).items()}

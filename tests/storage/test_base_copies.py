"""What others keep of the base comes back whole."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import swa_utils

from lightning_lora import adapter_state_dict
from lightning_lora.storage.checkpoint import adapter_only, complete_copies
from tests.support.faults import adapted, endless, frugal, laughs
from tests.support.models import LitTiny, data, lora, state, trainer

FROZEN = ("embed.weight", "q_proj.weight", "q_proj.bias", "v_proj.weight")


def averaged(module: LitTiny) -> Any:
    return swa_utils.AveragedModel(nn.ModuleDict(dict(module.named_children()))).state_dict()


def knotted(module: LitTiny) -> Any:
    knot: dict[Any, Any] = {0: "a key that is no name", 1.5: [module.embed.weight.data], "mine": module.state_dict()}
    knot["itself"] = knot
    return knot


KEPT: dict[str, Callable[[LitTiny], Any]] = {
    "its state": lambda module: module.state_dict(),
    "its parameters by name": lambda module: {name: p.detach().clone() for name, p in module.named_parameters()},
    "a list of its parameters": lambda module: list(module.parameters()),
    "the state of a part": lambda module: module.q_proj.state_dict(),
    "two states": lambda module: {f"{kind}.{name}": v for kind in "ab" for name, v in module.state_dict().items()},
    "an average as torch keeps it": averaged,
    "doubles": lambda module: {name: value.double() for name, value in module.state_dict().items()},
    "adapters and one weight": lambda module: adapter_state_dict(module) | {"embed.weight": module.embed.weight.data},
    "a knot": knotted,
}


def tensors(value: Any, seen: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """All the tensors inside ``value``."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list) and id(value) not in seen:
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each, (*seen, id(value)))


def alike(a: Any, b: Any, seen: tuple[int, ...] = ()) -> bool:
    """Whether two values have the same form and bits."""
    if isinstance(a, Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and torch.equal(a, b)
    if id(a) in seen:
        return True
    seen = (*seen, id(a))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(alike(a[key], b[key], seen) for key in a)
    return all(alike(x, y, seen) for x, y in zip(a, b, strict=True)) if isinstance(a, list) else bool(a == b)


class Keeps(L.Callback):
    """Keep something of the model from the first step on, in a callback's state or in the checkpoint."""

    def __init__(self, what: str, where: str) -> None:
        self.what, self.where, self.kept = what, where, None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.kept is None:
            self.kept = KEPT[self.what](pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {"mine": self.kept} if self.where == "callback" else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = state_dict["mine"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.where == "checkpoint":
            checkpoint["mine"] = self.kept

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.where == "checkpoint":
            self.kept = checkpoint["mine"]


class KeepsItself(LitTiny):
    """A module that keeps something of itself in the checkpoint."""

    keeps: list[Keeps]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = self.keeps[0].kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.keeps[0].kept = checkpoint["mine"]


@pytest.mark.parametrize("where", ["callback", "checkpoint", "module"])
@pytest.mark.parametrize("what", KEPT)
def test_what_others_keep_comes_back_as_it_was_and_is_their_own(tmp_path: Path, what: str, where: str) -> None:
    file, base = tmp_path / "a.ckpt", state(LitTiny())

    def run(epochs: int, ckpt_path: Path | None) -> tuple[Keeps, LitTiny]:
        keeps = Keeps(what, where)
        model = KeepsItself() if where == "module" else LitTiny()
        model.keeps = [keeps]
        callbacks = [lora(merge=False), keeps, ModelCheckpoint(tmp_path, "a", enable_version_counter=False)]
        trainer(tmp_path, callbacks, max_epochs=epochs).fit(model, data(), ckpt_path=ckpt_path)
        return keeps, model

    first, _ = run(1, None)
    kept = torch.load(file, weights_only=True)
    held = [value for value in tensors(kept) if tuple(value.shape) in {(20, 8), (8, 8)}]
    assert not held or what in ("doubles", "a knot")
    again, model = run(2, file)
    assert alike(first.kept, again.kept)
    with torch.no_grad():
        for value in tensors(again.kept):
            value.zero_()
    assert all(torch.equal(model.state_dict()[name], base[name]) for name in FROZEN)


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("make", [laughs, endless])
def test_values_that_hold_each_other_are_walked_once(tmp_path: Path, make: Callable[[], Any]) -> None:
    def work() -> None:
        model = adapted()
        checkpoint = {"state_dict": adapter_state_dict(model), "hyper_parameters": {"a": make()}}
        held = adapter_only(model, checkpoint)
        torch.save(held, tmp_path / "a.ckpt")

    frugal(work, seconds=30)


def test_what_is_held_twice_is_left_out_and_comes_back_in_both_places(tmp_path: Path) -> None:
    model = adapted()
    weights = {"w": model.q_proj.weight.detach().clone()}
    checkpoint = {"state_dict": adapter_state_dict(model), "a": weights, "b": [weights]}
    held = adapter_only(model, checkpoint)
    torch.save(held, tmp_path / "a.ckpt")
    again = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert again["a"]["w"] is None and again["b"][0]["w"] is None
    complete_copies(model, again)
    assert torch.equal(again["a"]["w"], weights["w"]) and torch.equal(again["b"][0]["w"], weights["w"])

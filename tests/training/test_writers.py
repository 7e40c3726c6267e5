"""A run resumes from the files of any CheckpointIO."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_lora.storage.formats.lightning import check_readable
from lightning_lora.storage.formats.own import leave_adapters
from tests.support.models import LitTiny, best, data, lora, same, state, trainer


class WritesLater(TorchCheckpointIO):
    """A CheckpointIO that writes all its files when the run is over."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.waiting.append((args, kwargs))

    def teardown(self) -> None:
        for args, kwargs in self.waiting:
            super().save_checkpoint(*args, **kwargs)
        self.waiting = []


class WritesAsync(AsyncCheckpointIO):
    """Lightning's own, around one that is slower than the run."""

    def __init__(self) -> None:
        self.slow = WritesLater()
        super().__init__(self.slow)

    def teardown(self) -> None:
        super().teardown()
        self.slow.teardown()


class Counts(L.Callback):
    """A callback whose state is the object that it goes on changing."""

    def __init__(self, seen: Any, add: Callable[[Any, int], object]) -> None:
        self.seen, self.add = seen, add

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.add(self.seen, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]


def put(values: Any, step: int) -> None:
    values[step - 1] = step


OBJECTS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], object]]] = {
    "set": (set, set.add),
    "list": (list, list.append),
    "array": (lambda: np.zeros(8), put),
    "tensor": (lambda: torch.zeros(8), put),
    "inside": (lambda: {"a": [(set(), [])]}, lambda value, step: value["a"][0][1].append(step)),
}


@pytest.mark.filterwarnings("ignore:Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD:UserWarning")
@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("writer", [WritesLater, WritesAsync])
def test_a_file_that_is_written_later_is_of_the_moment_of_its_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: type[Any], kind: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for the array
    make, add = OBJECTS[kind]

    def fit(folder: str, plugins: list[Any], **options: Any) -> tuple[Any, LitTiny]:
        counts, model, saves = Counts(make(), add), LitTiny(), best(tmp_path / folder, save_top_k=-1)
        t = trainer(tmp_path, [lora(merge=False), counts, saves], plugins=plugins)
        t.fit(model, data(), data(), **options)
        return counts.seen, model

    seen, whole = fit("a", [writer()])
    resumed_seen, resumed = fit("b", [], ckpt_path=tmp_path / "a" / "best-epoch=0.ckpt")
    assert repr(resumed_seen) == repr(seen) and same(state(resumed), state(whole))


class Keeps(L.Callback):
    """A callback that writes a tensor with a graph, which cannot be copied."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        losses = [0, torch.ones(1, requires_grad=True) * 2]
        checkpoint.update(first=losses, second={"also": losses})


def test_an_entry_that_cannot_be_copied_is_written_as_it_is_and_the_others_are_copied(tmp_path: Path) -> None:
    t = trainer(tmp_path, [lora(merge=False), Keeps()], plugins=[writer := WritesLater()], enable_checkpointing=False)
    t.fit(model := LitTiny(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    before = state(model)["q_proj.lora_A"]
    model.get_parameter("q_proj.lora_A").data.zero_()
    writer.teardown()
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["q_proj.lora_A"], before) and before.any()
    assert len(checkpoint["second"]["also"]) == 2
    leave_adapters(checkpoint)
    check_readable(checkpoint, tmp_path / "a.ckpt")


def written_to(files: list[Any]) -> Callable[..., None]:
    """A method that keeps a checkpoint, and makes its file."""

    def save_checkpoint(self: Any, checkpoint: dict[str, Any], path: Any, *_: Any, **__: Any) -> None:
        files.append(checkpoint)
        Path(path).touch()

    return save_checkpoint


def test_a_file_that_is_written_at_once_is_not_copied_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", written_to(written))
    counts = Counts(torch.zeros(8), put)
    t = trainer(tmp_path, [lora(merge=False), counts], max_steps=1, enable_checkpointing=False)
    t.fit(model := LitTiny(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    (checkpoint,) = written
    assert checkpoint["callbacks"]["Counts"]["seen"] is counts.seen
    assert checkpoint["state_dict"]["q_proj.lora_A"].data_ptr() == model.get_parameter("q_proj.lora_A").data_ptr()


class Notes(TorchCheckpointIO):
    """A CheckpointIO that writes down where the code was."""

    def save_checkpoint(self, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        super().save_checkpoint({**checkpoint, "git": "abc"}, *args, **kwargs)


def test_a_writer_may_add_an_entry_of_its_own(tmp_path: Path) -> None:
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False, plugins=[Notes()])
    t.fit(LitTiny(), data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["git"] == "abc"
    again = trainer(tmp_path, [lora(merge=False)], enable_checkpointing=False)
    again.fit(LitTiny(), data(), ckpt_path=tmp_path / "a.ckpt")
    assert again.global_step == 8

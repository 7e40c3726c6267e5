"""What a Trainer does around its steps costs as much as the adapters."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import unmerge_adapters
from lightning_lora.base import readings
from lightning_lora.tensors import digests as hashing
from lightning_lora.training.optimizers import float32_steps, group_checks
from lightning_lora.training.steps import backbones, gradients, non_backbones
from tests.support.cases import StopError
from tests.support.compared import assert_same_tensors
from tests.support.fits import fit, outcome
from tests.support.models import LitTiny, best, is_plain, lora, state, trainer
from tests.support.parameters import trainable_names

WIDTH = 128
BASE = 2 * WIDTH * WIDTH


class Wide(LitTiny):
    """A module whose base is far larger than its adapters and the samples of a look."""

    def __init__(self) -> None:
        super().__init__(width=WIDTH)


class Reads:
    """Counts the integers of large tensors that digests read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        digest_of_integers = hashing._digest_of_integers
        digests_as = readings.digests_as

        def counting(integers: Tensor) -> int:
            self.add(integers)
            return digest_of_integers(integers)

        def counting_halves(tensor: Tensor, dtypes: Any) -> list[int]:
            self.add(tensor)
            return digests_as(tensor, dtypes)

        monkeypatch.setattr(hashing, "_digest_of_integers", counting)
        monkeypatch.setattr(readings, "digests_as", counting_halves)

    def add(self, tensor: Tensor) -> None:
        if tensor.numel() >= WIDTH * WIDTH:
            self.count += tensor.numel()

    def passes(self) -> float:
        """The passes over the adapted weights since the last call."""
        passes = self.count / BASE
        self.count = 0
        return passes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


class Passes(L.Callback):
    """Notes the passes of the set-up, and of all that happens until training ends."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def on_train_start(self, *_: Any) -> None:
        self.in_set_up = self.reads.passes()

    def on_train_end(self, *_: Any) -> None:
        self.in_training = self.reads.passes()


@pytest.mark.parametrize(
    ("merge", "saving", "in_training"),
    [
        ("last", {"save_top_k": -1}, 1),
        ("last", {"every_n_epochs": 9}, 0),
        ("best", {}, 1),
    ],
)
def test_a_fit_reads_its_base_at_the_start_and_at_the_end_and_for_its_first_file(
    tmp_path: Path, reads: Reads, merge: Any, saving: Any, in_training: int
) -> None:
    passes = Passes(reads)
    fit(
        tmp_path,
        lora(merge=merge),
        best(tmp_path, **saving),
        passes,
        model=Wide(),
        max_epochs=4,
    )
    at_the_end = reads.passes()
    assert passes.in_set_up == 1
    assert passes.in_training == in_training
    assert at_the_end == 1


class LooksAtKind(L.Callback):
    """Notes whether a module was plain in its last validation."""

    def on_validation_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        self.was_plain = is_plain(pl_module)


def test_a_merged_model_is_evaluated_and_saved_without_a_look_at_its_base(
    tmp_path: Path, reads: Reads
) -> None:
    looks = LooksAtKind()
    model, t = fit(tmp_path, lora(), looks, model=Wide())
    merged = state(model)
    plain = copy.deepcopy(model)
    for stage in ("validate", "test", "predict"):
        expected = outcome(trainer(tmp_path), stage, plain)
        reads.passes()
        assert torch.equal(outcome(t, stage, model), expected)
        assert reads.passes() == 0
        assert_same_tensors(state(model), merged)
    assert looks.was_plain  # while it ran, too
    t.save_checkpoint(tmp_path / "a.ckpt")
    unmerge_adapters(model)
    t.save_checkpoint(tmp_path / "b.ckpt")
    assert reads.passes() == 0
    assert not is_plain(model)


def test_a_file_is_tested_with_one_look_and_what_the_user_froze_stays_frozen(
    tmp_path: Path, reads: Reads
) -> None:
    model, t = fit(tmp_path, lora(), best(tmp_path), model=Wide())
    reads.passes()
    model.freeze()
    outcome(t, "test", model, ckpt_path="best")
    assert reads.passes() <= 1
    assert trainable_names(model) == []


class Judged(LitTiny):
    """A module with frozen networks: one feeds the head, and one runs in validation alone."""

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.requires_grad_(False)
        self.head.requires_grad_(True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.judge(self.embed(batch[0]))


class Looks(L.Callback):
    """Notes in which steps these functions of the package are called."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *functions: tuple[Any, str]
    ) -> None:
        self.step = -1
        self.steps: set[int] = set()
        for room, name in functions:
            monkeypatch.setattr(room, name, self.noted(getattr(room, name)))

    def noted(self, function: Any) -> Any:
        def call(value: Any) -> Any:
            self.steps.add(self.step)
            return function(value)

        return call

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.step = trainer.global_step


# of what runs in validation
@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")
@pytest.mark.parametrize("build", [LitTiny, Judged])
def test_a_step_does_not_look_at_the_whole_module_its_graph_or_all_parameters(
    tmp_path: Path, build: Any, monkeypatch: Any
) -> None:
    looks = Looks(
        monkeypatch,
        (group_checks, "view_of"),
        (gradients, "view_of"),
        (non_backbones, "view_of"),
        (backbones, "_leaves_behind"),
        (float32_steps, "held_by"),
    )
    fit(tmp_path, lora(), looks, model=build())
    assert 0 in looks.steps
    assert looks.steps.isdisjoint({2, 3, 4, 5, 6})


class Changes(L.Callback):
    """Changes a value of a frozen weight, which torch does not count."""

    def __init__(self, place: int) -> None:
        self.place = place

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step == 3:
            pl_module.q_proj.weight.data.view(-1)[self.place] += 1


class Fails(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            raise StopError


def assert_change_is_stored(model: Wide, file: Path) -> None:
    stored = torch.load(file, weights_only=True)["state_dict"]
    assert torch.equal(stored["q_proj.weight"], model.q_proj.weight)


# The first value is a sample of a large weight, the second is none
@pytest.mark.filterwarnings("ignore:Code has written:lightning_lora.LoRAWarning")
@pytest.mark.parametrize(("place", "name"), [(0, "best.ckpt"), (1, "after.ckpt")])
def test_a_changed_value_is_stored_when_a_save_sees_it_or_at_the_end(
    tmp_path: Path, place: int, name: str
) -> None:
    model = Wide()
    saves = best(tmp_path, filename="best")
    _, t = fit(
        tmp_path, lora(merge=False), saves, Changes(place), model=model, max_epochs=1
    )
    t.save_checkpoint(tmp_path / "after.ckpt")
    assert_change_is_stored(model, tmp_path / name)


@pytest.mark.filterwarnings("ignore:Code has written:lightning_lora.LoRAWarning")
def test_a_changed_value_is_stored_after_a_fit_that_fails(tmp_path: Path) -> None:
    file = tmp_path / "after.ckpt"
    model = Wide()
    callbacks = [lora(merge=False), best(tmp_path), Changes(1), Fails()]
    with pytest.raises(StopError):
        fit(tmp_path, *callbacks, model=model, max_epochs=1)
    model.trainer.save_checkpoint(file)
    assert_change_is_stored(model, file)

"""What a Trainer does around its steps costs as much as the adapters."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor, nn

from lightning_lora import unmerge_adapters
from lightning_lora.base import base_tensors
from lightning_lora.tensors import digests as hashing
from lightning_lora.training.optimizers import float32_steps, places
from lightning_lora.training.steps import feeding, gradients
from tests.support.cases import StopError
from tests.support.fits import fit, outcome
from tests.support.models import LitTiny, best, is_plain, lora, same, state, trainer

WIDTH = 128
BASE = 2 * WIDTH * WIDTH


class Wide(LitTiny):  # whose base is far larger than its adapters and the samples of a look
    def __init__(self) -> None:
        super().__init__(width=WIDTH)


class Reads:  # counts the integers of large tensors that digests read
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, own = 0, hashing._digest_of_integers

        def counting(integers: Tensor) -> int:
            self.count += integers.numel() if integers.numel() >= WIDTH * WIDTH else 0
            return own(integers)

        monkeypatch.setattr(hashing, "_digest_of_integers", counting)
        own_halves = base_tensors.digests_as

        def counting_halves(tensor: Tensor, dtypes: Any) -> list[int]:
            self.count += tensor.numel() if tensor.numel() >= WIDTH * WIDTH else 0
            return own_halves(tensor, dtypes)

        monkeypatch.setattr(base_tensors, "digests_as", counting_halves)

    def passes(self) -> float:
        """The passes over the adapted weights since the last call."""
        count, self.count = self.count, 0
        return count / BASE


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


class Passes(L.Callback):  # notes the passes of the set-up, and of all that happens until training ends
    def __init__(self, reads: Reads) -> None:
        self.reads, self.found = reads, dict[str, float]()

    def on_train_start(self, *_: Any) -> None:
        self.found["set-up"] = self.reads.passes()

    def on_train_end(self, *_: Any) -> None:
        self.found["training"] = self.reads.passes()


def test_a_fit_reads_its_base_at_the_start_and_at_the_end_and_for_its_first_file(tmp_path: Path, reads: Reads) -> None:
    for merge, saved, training in (
        ("last", best(tmp_path, save_top_k=-1), 1),
        ("last", best(tmp_path, every_n_epochs=9), 0),
        ("best", best(tmp_path), 1),
    ):
        fit(tmp_path, lora(merge=merge), saved, marks := Passes(reads), model=Wide(), max_epochs=4)
        assert marks.found == {"set-up": 1, "training": training} and reads.passes() == 1


def test_a_merged_model_is_evaluated_and_saved_without_a_look_at_its_base(tmp_path: Path, reads: Reads) -> None:
    seen: list[bool] = []
    looks = LambdaCallback(on_validation_start=lambda t, m: seen.append(is_plain(m)))
    model, t = fit(tmp_path, lora(), looks, model=Wide())
    merged, plain = state(model), copy.deepcopy(model)
    stages = ("validate", "test", "predict")
    expected = [outcome(trainer(tmp_path), stage, plain) for stage in stages]
    reads.passes()
    for stage, values in zip(stages, expected, strict=True):
        assert torch.equal(outcome(t, stage, model), values)
        assert reads.passes() == 0 and same(state(model), merged)
    assert seen[-1]  # while it ran, too
    t.save_checkpoint(tmp_path / "a.ckpt")
    unmerge_adapters(model)
    t.save_checkpoint(tmp_path / "b.ckpt")
    assert reads.passes() == 0 and not is_plain(model)


def test_a_file_is_tested_with_one_look_and_what_the_user_froze_stays_frozen(tmp_path: Path, reads: Reads) -> None:
    model, t = fit(tmp_path, lora(), best(tmp_path), model=Wide())
    reads.passes()
    model.freeze()
    outcome(t, "test", model, ckpt_path="best")
    assert reads.passes() <= 1 and not any(p.requires_grad for p in model.parameters())


class Judged(LitTiny):  # with frozen networks: one feeds the head, and one runs in validation alone
    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.requires_grad_(False).head.requires_grad_(True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.judge(self.embed(batch[0]))


@pytest.mark.filterwarnings("ignore::lightning_lora.DeadAdapterWarning")  # of what runs in validation
@pytest.mark.parametrize("build", [LitTiny, Judged])
def test_a_step_does_not_look_at_the_whole_module_its_graph_or_all_parameters(
    tmp_path: Path, build: Any, monkeypatch: Any
) -> None:
    looks = list[int]()
    views = [(places, "view_of"), (gradients, "view_of"), (feeding, "view_of")]
    for room, name in (*views, (feeding, "_leaves_behind"), (float32_steps, "held_by")):
        own = getattr(room, name)
        monkeypatch.setattr(room, name, lambda value, own=own: looks.append(steps.step) or own(value))
    steps = L.Callback()
    steps.step = -1  # type: ignore[attr-defined]
    steps.on_train_batch_start = lambda t, *_: setattr(steps, "step", t.global_step)  # type: ignore[method-assign]
    fit(tmp_path, lora(), steps, model=build())
    assert 0 in looks and not {2, 3, 4, 5, 6} & set(looks)


class Changes(L.Callback):  # a value of a frozen weight, which torch does not count
    def __init__(self, place: int, fails: bool) -> None:
        self.place, self.fails = place, fails

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            pl_module.q_proj.weight.data.view(-1)[self.place] += 1
            if self.fails:
                raise StopError


# The first value is a sample of a large weight, the second is none
@pytest.mark.filterwarnings("ignore:Code has written:lightning_lora.LoRAWarning")
@pytest.mark.parametrize(("place", "fails", "file"), [(0, False, "best"), (1, False, "after"), (1, True, "after")])
def test_a_changed_value_is_stored_when_a_save_sees_it_or_at_the_end(
    tmp_path: Path, place: int, fails: bool, file: str
) -> None:
    model, saves = Wide(), best(tmp_path, filename="best")
    with pytest.raises(StopError) if fails else nullcontext():
        fit(tmp_path, lora(merge=False), saves, Changes(place, fails), model=model, max_epochs=1)
    model.trainer.save_checkpoint(tmp_path / "after.ckpt")
    stored = torch.load(tmp_path / f"{file}.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["q_proj.weight"], model.q_proj.weight)

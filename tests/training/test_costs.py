"""What a Trainer does around its steps costs as much as the adapters."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import BaseMismatchError, LoRAWarning, load_adapter, save_adapter, unmerge_adapters
from lightning_lora.layers import LoRALayer
from lightning_lora.model import state as record
from lightning_lora.tensors import digests as hashing
from tests.support.cases import StopError
from tests.support.models import LitTiny, best, data, is_plain, lora, same, state, trainer

WIDTH = 128
BASE = 2 * WIDTH * WIDTH


class Wide(LitTiny):
    """A module whose base is far larger than its adapters and the samples of a look."""

    def __init__(self) -> None:
        super().__init__(width=WIDTH)


class Reads:
    """Counts the integers of large tensors that digests read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, own = 0, hashing._digest_of_integers

        def counting(integers: Tensor) -> int:
            self.count += integers.numel() if integers.numel() >= WIDTH * WIDTH else 0
            return own(integers)

        monkeypatch.setattr(hashing, "_digest_of_integers", counting)
        own_halves = record.digests_as

        def counting_halves(tensor: Tensor, dtypes: Any) -> list[int]:
            self.count += tensor.numel() if tensor.numel() >= WIDTH * WIDTH else 0
            return own_halves(tensor, dtypes)

        monkeypatch.setattr(record, "digests_as", counting_halves)

    def passes(self) -> float:
        """The passes over the adapted weights since the last call."""
        count, self.count = self.count, 0
        return count / BASE


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


class Passes(L.Callback):
    """Notes the passes of the set-up, and of all that happens until training ends."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.found = reads, dict[str, float]()

    def on_train_start(self, *_: Any) -> None:
        self.found["set-up"] = self.reads.passes()

    def on_train_end(self, *_: Any) -> None:
        self.found["training"] = self.reads.passes()


def test_a_fit_reads_its_base_at_the_start_and_at_the_end_and_for_its_first_file(tmp_path: Path, reads: Reads) -> None:
    for saved, training in (best(tmp_path, save_top_k=-1), 1), (best(tmp_path, every_n_epochs=9), 0):
        marks = Passes(reads)
        trainer(tmp_path, [lora(), saved, marks], max_epochs=4).fit(Wide(), data(), data())
        assert marks.found == {"set-up": 1, "training": training} and reads.passes() == 1
    assert len(list(tmp_path.glob("*.ckpt"))) == 4


def test_a_base_is_read_in_half_precision_once_however_often_it_trains_and_is_saved(
    tmp_path: Path, reads: Reads
) -> None:
    model, file = Wide(), tmp_path / "a.safetensors"
    trainer(tmp_path, [lora(), best(tmp_path)]).fit(model, data(), data())
    marks = Passes(reads)
    trainer(tmp_path, [lora(merge=False), best(tmp_path), marks]).fit(model, data(), data())
    assert marks.found["training"] == 0
    reads.passes()
    for _ in range(2):
        save_adapter(model, file)
        assert reads.passes() == 1
    other = Wide().bfloat16()
    with pytest.warns(LoRAWarning, match="same base, converted"):
        load_adapter(other, file)
    assert reads.passes() == 1  # as in any load: the file says what it is in half precision


def test_the_best_file_is_merged_without_another_look_at_the_base(tmp_path: Path, reads: Reads) -> None:
    marks = Passes(reads)
    trainer(tmp_path, [lora(merge="best"), best(tmp_path), marks]).fit(Wide(), data(), data())
    assert reads.passes() == 1


def test_a_merged_model_is_evaluated_and_saved_without_a_look_at_its_base(tmp_path: Path, reads: Reads) -> None:
    model, callback = Wide(), lora()
    t = trainer(tmp_path, [callback])
    t.fit(model, data())
    reads.passes()
    for run in (
        lambda: t.validate(model, data(), verbose=False),
        lambda: t.test(model, data(), verbose=False),
        lambda: t.predict(model, data()),
        lambda: t.save_checkpoint(tmp_path / "a.ckpt"),
    ):
        run()
        assert reads.passes() == 0 and is_plain(model)
    unmerge_adapters(model)
    t.save_checkpoint(tmp_path / "b.ckpt")
    assert reads.passes() == 0


def test_a_file_is_tested_with_one_look_at_the_base(tmp_path: Path, reads: Reads) -> None:
    model, saved = Wide(), best(tmp_path)
    t = trainer(tmp_path, [lora(), saved])
    t.fit(model, data(), data())
    reads.passes()
    t.test(model, data(), ckpt_path="best", verbose=False)
    assert reads.passes() <= 1


def test_evaluation_of_a_merged_model_runs_the_merged_weights(tmp_path: Path) -> None:
    model, kinds = LitTiny(), list[type[nn.Module]]()

    class Look(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            kinds.extend(type(module) for module in pl_module.modules())

    trainer(tmp_path, [lora()]).fit(model, data())
    before = state(model)
    plain = trainer(tmp_path).validate(copy.deepcopy(model), data(), verbose=False)
    assert trainer(tmp_path, [lora(), Look()]).validate(model, data(), verbose=False) == plain
    assert same(state(model), before) and not any(issubclass(kind, LoRALayer) for kind in kinds)
    unmerge_adapters(model)
    assert not is_plain(model)


def test_a_file_is_tested_on_its_adapters_and_the_merged_model_comes_back(tmp_path: Path) -> None:
    model, saved = LitTiny(), best(tmp_path)
    t = trainer(tmp_path, [lora(), saved])
    t.fit(model, data(), data())
    t.save_checkpoint(tmp_path / "last.ckpt")
    before, fresh = state(model), LitTiny()
    load_adapter(fresh, tmp_path / "last.ckpt")
    expected = trainer(tmp_path).test(fresh, data(), verbose=False)
    found = t.test(model, data(), ckpt_path=str(tmp_path / "last.ckpt"), verbose=False)
    assert found[0]["test_loss"] == pytest.approx(expected[0]["test_loss"])
    assert is_plain(model) and all(torch.allclose(value, before[name]) for name, value in state(model).items())


def test_a_frozen_weight_that_changes_between_saves_is_stored(tmp_path: Path) -> None:
    class Changing(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.embed.weight.data[0, 0] += 1  # torch counts no change, but a look sees it

    model = LitTiny()
    saved = best(tmp_path, save_top_k=-1, filename="{epoch}", monitor=None)
    trainer(tmp_path, [lora(merge=False), saved, Changing()], max_epochs=1).fit(model, data())
    stored = torch.load(next(tmp_path.glob("*.ckpt")), weights_only=True)["state_dict"]
    assert torch.equal(stored["embed.weight"], model.embed.weight)


@pytest.mark.parametrize("fails", [False, True])
def test_a_change_that_no_save_has_seen_is_found_at_the_end(tmp_path: Path, fails: bool) -> None:
    class Hidden(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.q_proj.weight.data.view(-1)[1] += 1  # between the samples of a large weight
                if fails:
                    raise StopError

    model = Wide()
    t = trainer(tmp_path, [lora(merge=False), best(tmp_path, monitor=None), Hidden()])
    with pytest.raises(StopError) if fails else nullcontext():
        t.fit(model, data())
    t.save_checkpoint(tmp_path / "after.ckpt")
    stored = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(stored["q_proj.weight"], model.q_proj.weight)


class LoadsInSetup(LitTiny):
    """A module that loads its pretrained weights in a hook, over whatever is there."""

    def setup(self, stage: str) -> None:
        self.load_state_dict(LitTiny().state_dict(), strict=False)


@pytest.mark.filterwarnings("ignore:A state of the base was loaded:lightning_lora.LoRAWarning")
def test_a_module_that_loads_its_base_in_setup_is_evaluated_with_its_adapters(tmp_path: Path) -> None:
    model, t = LoadsInSetup(), trainer(tmp_path, [lora(modules_to_save=None, exclude_modules=["head"])])
    t.fit(model, data())
    before, index = state(model), torch.arange(8)
    output = model(index)
    found = t.validate(model, data(), verbose=False)[0]["val_loss"]
    plain = LitTiny()
    plain.load_state_dict(before)
    assert found == pytest.approx(trainer(tmp_path).validate(plain, data(), verbose=False)[0]["val_loss"])
    assert torch.equal(model(index), output)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_merged_model_evaluated_in_another_precision_still_takes_its_files(tmp_path: Path, precision: Any) -> None:
    model, how = LitTiny(), {"modules_to_save": None, "exclude_modules": ["head"]}
    t = trainer(tmp_path, [lora(**how)])
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    other = trainer(tmp_path, [lora(**how)], precision=precision)
    other.validate(model, data(), verbose=False)
    other.test(model, data(), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_a_file_that_cannot_be_tested_leaves_a_changed_merged_model_its_memory(tmp_path: Path) -> None:
    model = LitTiny()
    t = trainer(tmp_path, [lora()])
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "a.ckpt")
    merged = model.q_proj.weight.detach().clone()
    with torch.no_grad():
        model.q_proj.weight.add_(1)
    with pytest.warns(UserWarning, match="taken as a new base"), pytest.raises(BaseMismatchError):
        t.test(model, data(), ckpt_path=tmp_path / "a.ckpt")
    assert is_plain(model)
    with torch.no_grad():
        model.q_proj.weight.copy_(merged)
    unmerge_adapters(model)
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)


def test_what_the_user_froze_of_a_merged_model_stays_frozen_after_a_file_was_tested(tmp_path: Path) -> None:
    model, saved = LitTiny(), best(tmp_path)
    t = trainer(tmp_path, [lora(), saved])
    t.fit(model, data(), data())
    model.freeze()
    t.test(model, data(), ckpt_path="best", verbose=False)
    assert not any(p.requires_grad for p in model.parameters())

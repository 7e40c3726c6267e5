"""Adapters go onto the base that they were trained on."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks as bundled

import lightning_lora as ll
from tests.support.models import LitTiny, best, data, lora, needs_averaging, same, state, trainer
from tests.support.storage import fitted, refused, restores, saved, trained


def test_adapters_need_their_own_base(file: Path) -> None:
    for change in (0, -1):
        model = LitTiny()
        with torch.no_grad():
            model.q_proj.weight.view(-1)[change] += 1e-6  # one element, hardly
        with refused(model, ll.BaseMismatchError, "q_proj.weight"):
            ll.load_adapter(model, file)
    says = r"another architecture.* is \(4, 8\) there and \(4, 6\) here"
    with refused(model := LitTiny(width=6), ll.BaseMismatchError, says):
        ll.load_adapter(model, file)


def test_file_says_the_base_that_lies_under_the_adapters_now(tmp_path: Path) -> None:
    model, other = trained(), LitTiny()
    with torch.no_grad():
        other.embed.weight.add_(1)
    ll.save_adapter(model, tmp_path / "before.safetensors")
    with pytest.warns(ll.LoRAWarning, match="stay as they are"):
        model.load_state_dict(other.state_dict())
    ll.save_adapter(model, tmp_path / "after.safetensors")
    ll.load_adapter(other, tmp_path / "after.safetensors")
    with pytest.raises(ll.BaseMismatchError):
        ll.load_adapter(LitTiny(), tmp_path / "after.safetensors")


class Drifts(LitTiny):
    """Its own code changes a frozen weight."""

    def on_train_epoch_start(self) -> None:
        with torch.no_grad():
            self.embed.weight.mul_(0.9)


def drifted(folder: Path) -> tuple[Drifts, list[Path]]:
    """A model whose frozen weight changed in a fit, and a file of each of its epochs."""
    model, saves = Drifts(), best(folder / "drifts", monitor=None, save_top_k=-1, filename="{epoch}")
    trainer(folder, [lora(merge=False), saves]).fit(model, data())
    return model, sorted((folder / "drifts").glob("*.ckpt"))


def test_files_of_a_run_that_changed_its_base_load_in_any_order_until_it_changes_again(tmp_path: Path) -> None:
    model, (first, second) = drifted(tmp_path)
    for file in (first, second, second, first):
        ll.load_adapter(model, file)
        fresh = restores(file, model)
    ll.load_adapter(fresh, second)
    restores(second, fresh)
    with torch.no_grad():
        model.embed.weight.mul_(0.9)
    with pytest.raises(ll.BaseMismatchError, match=r"'embed.weight'"):
        ll.load_adapter(model, second)


def test_a_changed_base_that_is_loaded_anew_takes_all_adapters_of_its_run(tmp_path: Path) -> None:
    model, files = drifted(tmp_path)
    for file in files:
        with pytest.warns(ll.LoRAWarning, match="stay as they are"):
            model.load_state_dict(LitTiny().state_dict())
        ll.load_adapter(model, file)
        restores(file, model)
    ll.remove_adapters(model)
    assert same(state(model), state(LitTiny()))


@pytest.mark.parametrize("merge", [False, "last"])
def test_a_model_that_was_converted_after_its_fit_stores_the_base_it_is_now(tmp_path: Path, merge: Any) -> None:
    model, t = LitTiny(), trainer(tmp_path, [lora(merge=merge)], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    ll.unmerge_adapters(model.double())
    t.save_checkpoint(tmp_path / "wide.ckpt")
    restores(tmp_path / "wide.ckpt", model, LitTiny().double())


def test_the_form_that_a_trainer_converted_is_the_one_that_is_compared(tmp_path: Path) -> None:
    """A file of a half precision run knows its base in two dtypes; the error is about the one that is here."""
    fitted(tmp_path / "half.ckpt", LitTiny(), precision="bf16-true")
    other = LitTiny().bfloat16()
    with torch.no_grad():
        other.embed.weight.neg_()
    with pytest.raises(ll.BaseMismatchError, match=r"another base: 1 of 4 .* such as 'embed.weight'"):
        ll.load_adapter(other, tmp_path / "half.ckpt")
    for same_base in (LitTiny(), LitTiny().bfloat16()):
        ll.load_adapter(same_base, tmp_path / "half.ckpt")
    for converted in (LitTiny().bfloat16().half(), LitTiny().double()):
        with pytest.warns(ll.LoRAWarning, match="It is the same base, converted"):
            ll.load_adapter(converted, tmp_path / "half.ckpt")


@needs_averaging
@pytest.mark.parametrize("beside", [False, True])
def test_a_full_checkpoint_of_an_average_is_the_base_of_a_fine_tune(tmp_path: Path, beside: bool) -> None:
    """Lightning puts the average where a checkpoint has its state, and the model beside it."""
    average = partial(bundled.EMAWeightAveraging, decay=0.5)
    saves = bundled.ModelCheckpoint(tmp_path, "full")
    trainer(tmp_path, [average(), saves], max_epochs=2).fit(LitTiny(), data())
    state = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    companions: list[L.Callback] = [average()] if beside else []
    model, t = LitTiny(), trainer(tmp_path, [lora(merge=False), *companions], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data(), ckpt_path=tmp_path / "full.ckpt")
    assert t.global_step == 4  # a run of its own, from the start
    with ll.disable_adapters(model):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    ll.save_adapter(model, tmp_path / "lora.safetensors")
    base = LitTiny()
    base.load_state_dict(state)
    restores(tmp_path / "lora.safetensors", model, base)


def masked(columns: list[int]) -> LitTiny:
    """A module with a sparse mask."""
    model, places = LitTiny(), torch.tensor([[0, 1], columns])
    model.register_buffer("mask", torch.sparse_coo_tensor(places, [1.0, 2.0], (4, 4), check_invariants=True).coalesce())
    return model


def test_sparse_values_at_other_places_are_another_base(tmp_path: Path) -> None:
    saved(file := tmp_path / "a.safetensors", masked([0, 1]))
    ll.load_adapter(masked([0, 1]), file)
    with pytest.raises(ll.BaseMismatchError, match=r"differ, such as 'mask'"):
        ll.load_adapter(masked([1, 0]), file)

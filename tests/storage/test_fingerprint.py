"""Adapters go onto the base that they were trained on."""

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import callbacks as bundled

import lightning_lora as ll
from tests.support.compared import assert_same_state
from tests.support.fits import fit
from tests.support.models import LitTiny, best, lora, needs_averaging
from tests.support.storage import fitted, refused, restores, saved


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


class Drifts(LitTiny):  # its own code loads another frozen weight, and a buffer
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(1))

    def on_train_epoch_start(self) -> None:
        self.load_state_dict({"embed.weight": self.embed.weight * 0.9, "gain": self.gain * 0.9}, strict=False)


def drifted(folder: Path) -> tuple[Drifts, list[Path]]:
    """A model whose frozen weight changed in a fit, and a file of each of its epochs."""
    saves = best(folder / "drifts", monitor=None, save_top_k=-1, filename="{epoch}")
    model, _ = fit(folder, lora(merge=False), saves, model=Drifts)
    return model, sorted((folder / "drifts").glob("*.ckpt"))


def test_files_of_a_run_that_changed_its_base_load_in_any_order_and_onto_the_base_anew(tmp_path: Path) -> None:
    model, (first, second) = drifted(tmp_path)
    for file in (first, second, second, first):
        ll.load_adapter(model, file)
        restores(file, model, Drifts())
    with pytest.warns(ll.LoRAWarning, match="below trained adapters"):
        model.load_state_dict(Drifts().state_dict())
    ll.load_adapter(model, second)
    restores(second, model, Drifts())
    ll.remove_adapters(model)
    assert_same_state(model, Drifts())


def test_a_frozen_weight_that_changed_before_the_first_file_is_not_taken_for_the_base(tmp_path: Path) -> None:
    _, (first, _) = drifted(tmp_path)
    wrong = Drifts()
    with torch.no_grad():
        wrong.embed.weight.mul_(0.9)
    with refused(
        wrong.bfloat16(),
        ll.BaseMismatchError,
        "1 of 5 frozen tensors of Drifts differ, such as 'embed.weig",
    ):
        ll.load_adapter(wrong, first)
    ll.load_adapter(Drifts(), first)


def test_a_model_that_was_converted_after_its_fit_stores_the_base_it_is_now(tmp_path: Path) -> None:
    model, t = fit(tmp_path, lora(), max_epochs=1)
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
    fit(tmp_path, average(), saves)
    state = torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    companions = [average()] if beside else []
    model, t = fit(
        tmp_path,
        lora(merge=False),
        *companions,
        max_epochs=1,
        ckpt_path=tmp_path / "full.ckpt",
    )
    assert t.global_step == 4  # a run of its own, from the start
    with ll.disable_adapters(model):
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    ll.save_adapter(model, tmp_path / "lora.safetensors")
    base = LitTiny()
    base.load_state_dict(state)
    restores(tmp_path / "lora.safetensors", model, base)


def masked(columns: list[int]) -> LitTiny:
    """A module with a sparse mask."""
    model = LitTiny()
    places = torch.tensor([[0, 1], columns])
    model.register_buffer(
        "mask",
        torch.sparse_coo_tensor(places, [1.0, 2.0], (4, 4), check_invariants=True).coalesce(),
    )
    return model


def test_sparse_values_at_other_places_are_another_base(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    saved(file, masked([0, 1]))
    ll.load_adapter(masked([0, 1]), file)
    with pytest.raises(ll.BaseMismatchError, match=r"differ, such as 'mask'"):
        ll.load_adapter(masked([1, 0]), file)

"""Adapters go onto the base that they were trained on."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as bundled
from torch import nn

import lightning_lora as ll
from lightning_lora.model.view import view_of
from lightning_lora.storage.same_base.stored_fingerprints import fingerprints_to_store
from tests.support.compared import assert_holds, assert_same_state
from tests.support.fits import fit
from tests.support.models import LitTiny, best, lora, needs_averaging
from tests.support.parameters import add_to
from tests.support.storage import fitted, refused, restores, saved


@pytest.mark.parametrize("place", [0, -1])
def test_adapters_need_their_own_base(file: Path, place: int) -> None:
    model = LitTiny()
    with torch.no_grad():
        model.q_proj.weight.view(-1)[place] += 1e-6  # one element, hardly
    with refused(model, ll.BaseMismatchError, "q_proj.weight"):
        ll.load_adapter(model, file)


@pytest.mark.parametrize(
    ("changed", "ends"),
    [
        (["q_proj"], r"load_adapter\. If this model is merged, load its base\."),
        (["embed"], r"If these layers or rows are new, .* trainable_token_indices\)\."),
        (["embed", "q_proj", "v_proj", "head"], r"__init__ or setup, or before .*"),
    ],
)
def test_the_remedy_is_that_for_the_tensors_that_differ(
    file: Path, changed: list[str], ends: str
) -> None:
    model = LitTiny()
    for name in changed:
        for parameter in model.get_submodule(name).parameters():
            add_to(parameter, 1)
    says = rf"such as .* Load the same pretrained weights as .*{ends}$"
    with pytest.raises(ll.BaseMismatchError, match=says) as told:
        ll.load_adapter(model, file)
    assert ("If" in str(told.value)) == (len(changed) < 4)


class Drifts(LitTiny):  # its own code loads another frozen weight, and a buffer
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(1))

    def on_train_epoch_start(self) -> None:
        self.load_state_dict(
            {"embed.weight": self.embed.weight * 0.9, "gain": self.gain * 0.9},
            strict=False,
        )


def drifted(folder: Path) -> tuple[Drifts, list[Path]]:
    """A model whose frozen weight changed in a fit, and a file of each of its epochs."""
    saves = best(folder / "drifts", monitor=None, save_top_k=-1, filename="{epoch}")
    model, _ = fit(folder, lora(merge=False), saves, model=Drifts)
    return model, sorted((folder / "drifts").glob("*.ckpt"))


def test_files_of_a_run_that_changed_its_base_load_in_any_order_and_onto_the_base_anew(
    tmp_path: Path,
) -> None:
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


def test_adapters_need_the_architecture_of_their_base(file: Path) -> None:
    narrow = LitTiny(width=6)
    says = r"another architecture.* is \(4, 8\) there and \(4, 6\) here"
    with refused(narrow, ll.BaseMismatchError, says):
        ll.load_adapter(narrow, file)


def test_a_frozen_weight_that_changed_before_the_first_file_is_not_taken_for_the_base(
    tmp_path: Path,
) -> None:
    _, (first, _) = drifted(tmp_path)
    wrong = Drifts()
    add_to(wrong.embed.weight, 0.1)
    wrong.bfloat16()
    says = "1 of 5 frozen tensors of Drifts differ, such as 'embed.weig"
    with refused(wrong, ll.BaseMismatchError, says):
        ll.load_adapter(wrong, first)
    ll.load_adapter(Drifts(), first)


def test_a_model_that_was_converted_after_its_fit_stores_the_base_it_is_now(
    tmp_path: Path,
) -> None:
    model, t = fit(tmp_path, lora(), max_epochs=1)
    ll.unmerge_adapters(model.double())
    t.save_checkpoint(tmp_path / "wide.ckpt")
    restores(tmp_path / "wide.ckpt", model, LitTiny().double())


@pytest.fixture(scope="module")
def half_precision_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a half precision run, which knows its base in two dtypes."""
    path = tmp_path_factory.mktemp("half") / "half.ckpt"
    fitted(path, LitTiny(), precision="bf16-true")
    return path


def test_the_form_that_a_trainer_converted_is_the_one_that_is_compared(
    half_precision_file: Path,
) -> None:
    """The error is about the one that is here."""
    other = LitTiny().bfloat16()
    add_to(other.embed.weight, 1)
    with pytest.raises(
        ll.BaseMismatchError, match=r"another base: 1 of 4 .* such as 'embed.weight'"
    ):
        ll.load_adapter(other, half_precision_file)
    ll.load_adapter(LitTiny(), half_precision_file)
    ll.load_adapter(LitTiny().bfloat16(), half_precision_file)


@pytest.mark.parametrize(
    "convert", [lambda model: model.bfloat16().half(), LitTiny.double]
)
def test_a_form_that_the_trainer_had_not_is_a_converted_one(
    half_precision_file: Path, convert: Any
) -> None:
    model = convert(LitTiny())
    with pytest.warns(ll.LoRAWarning, match="It is the same base, converted"):
        ll.load_adapter(model, half_precision_file)


@needs_averaging
@pytest.mark.parametrize("beside", [False, True])
def test_a_full_checkpoint_of_an_average_is_the_base_of_a_fine_tune(
    tmp_path: Path, beside: bool
) -> None:
    """Lightning puts the average where a checkpoint has its state, and the model beside it."""
    full = tmp_path / "full.ckpt"
    average = partial(bundled.EMAWeightAveraging, decay=0.5)
    fit(tmp_path, average(), bundled.ModelCheckpoint(tmp_path, "full"))
    averaged = torch.load(full, weights_only=True)["state_dict"]
    callbacks = [lora(merge=False)]
    if beside:
        callbacks.append(average())
    model, t = fit(tmp_path, *callbacks, max_epochs=1, ckpt_path=full)
    assert t.global_step == 4  # a run of its own, from the start
    with ll.disable_adapters(model):
        assert_holds(model.state_dict(), averaged)
    ll.save_adapter(model, tmp_path / "lora.safetensors")
    base = LitTiny()
    base.load_state_dict(averaged)
    restores(tmp_path / "lora.safetensors", model, base)


def masked(columns: list[int]) -> LitTiny:
    """A module with a sparse mask."""
    places = torch.tensor([[0, 1], columns])
    mask = torch.sparse_coo_tensor(places, [1.0, 2.0], (4, 4), check_invariants=True)
    model = LitTiny()
    model.register_buffer("mask", mask.coalesce())
    return model


def test_sparse_values_at_other_places_are_another_base(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    saved(file, masked([0, 1]))
    ll.load_adapter(masked([0, 1]), file)
    with pytest.raises(ll.BaseMismatchError, match=r"differ, such as 'mask'"):
        ll.load_adapter(masked([1, 0]), file)


def test_a_counter_has_no_half_digests_in_a_later_file_either() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    nn.init.zeros_(model[0].bias)  # eight bytes, as those of the norm's counter
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    first, second = (fingerprints_to_store(view_of(model)) for _ in range(2))
    assert first == second
    assert second[0]["rounded"]["1.num_batches_tracked"] == []

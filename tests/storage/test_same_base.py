"""A base is recognised in another precision."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.support.compared import assert_same_state, assert_same_tensors
from tests.support.models import LitTiny, X, data, lora, trainer
from tests.support.parameters import add_to
from tests.support.storage import CONFIG, fitted, refused, saved, trained

CONVERTED = "trained on a base in .* is in .* It is the same base, converted"
DTYPES = {
    "double": torch.float64,
    "single": torch.float32,
    "bfloat": torch.bfloat16,
    "half": torch.float16,
}
converted = pytest.mark.filterwarnings(
    f"ignore:.*{CONVERTED}:lightning_lora.LoRAWarning"
)


def pairs() -> list[Any]:
    """Every two dtypes in which a base may be: that of the file, and that of the model."""
    found = []
    for there, here in itertools.product(DTYPES, DTYPES):
        found.append(pytest.param(DTYPES[there], DTYPES[here], id=f"{there}-{here}"))
    return found


HALVES = {torch.bfloat16, torch.float16}


@pytest.mark.parametrize(("there", "here"), pairs())
def test_a_base_is_recognised_if_one_was_converted_to_the_other(
    tmp_path: Path, there: Any, here: Any
) -> None:
    file = tmp_path / "a.safetensors"
    model = saved(file, LitTiny().to(there), **CONFIG.to_dict())
    other = LitTiny().to(here)
    if {there, here} == HALVES:
        both_rounded = "3 of 3 frozen tensors.*rounded twice, or to float16 there"
        with refused(other, ll.BaseMismatchError, both_rounded):
            ll.load_adapter(other, file)
        return
    told = (
        nullcontext([1])
        if there == here
        else pytest.warns(ll.LoRAWarning, match=CONVERTED)
    )
    if there == torch.float64 != here:  # adapters are never rounded
        with told, refused(other, ll.AdapterMismatchError, "'q_proj.lora_A' is torch"):
            ll.load_adapter(other, file)
        return
    with told as seen:
        ll.load_adapter(other, file)
    assert len(seen) == 1
    assert torch.allclose(other(X).double(), model(X).double(), atol=0.1)
    assert other.embed.weight.dtype == here
    assert other.head.weight.dtype == here
    assert other.q_proj.lora_A.dtype == torch.promote_types(here, torch.float32)


@converted
@pytest.mark.parametrize("is_file_converted", [True, False])
@pytest.mark.parametrize(
    ("first", "second"),
    [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)],
)
def test_what_was_rounded_to_one_half_precision_is_recognised_in_the_other(
    tmp_path: Path, first: torch.dtype, second: torch.dtype, is_file_converted: bool
) -> None:
    """Published weights in bfloat16, loaded as float16 on a card without it; or the other way round."""
    path = tmp_path / "a.safetensors"
    rounded = LitTiny().to(first)
    twice = LitTiny().to(first).to(second)
    there, here = (twice, rounded) if is_file_converted else (rounded, twice)
    saved(path, there, **CONFIG.to_dict())
    ll.load_adapter(here, path)
    ll.load_adapter(LitTiny().to(first), path)


def test_in_its_own_precision_a_base_is_compared_to_the_bit(file: Path) -> None:
    model = LitTiny().bfloat16().float()  # which is the same after rounding
    with refused(model, ll.BaseMismatchError, "another base: 3 of 3"):
        ll.load_adapter(model, file)


def test_what_was_trained_in_full_is_converted_but_not_to_infinity(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    model = trained()
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    ll.save_adapter(model, path)
    half = LitTiny().half()
    with pytest.warns(match=CONVERTED), refused(half, Exception, "'head.weight' is"):
        ll.load_adapter(half, path)
    other = LitTiny().bfloat16()
    with pytest.warns(ll.LoRAWarning, match=CONVERTED):
        ll.load_adapter(other, path)
    assert torch.equal(other.head.weight, model.head.weight.bfloat16())
    assert torch.equal(other.q_proj.lora_A, model.q_proj.lora_A)


class Lit(LitTiny):  # a module in a precision of its own, and perhaps another base
    def __init__(self, dtype: str = "float32", more: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed.weight.data.add_(more)
        self.to(getattr(torch, dtype))


@converted
def test_a_trainer_resumes_and_tests_on_a_converted_base(tmp_path: Path) -> None:
    file = tmp_path / "a.ckpt"
    later = tmp_path / "later.ckpt"
    model = fitted(file, Lit())
    (expected,) = trainer(tmp_path).test(model, data(), verbose=False)
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=2, enable_checkpointing=False)
    (found,) = t.test(Lit("bfloat16"), data(), ckpt_path=file, verbose=False)
    assert found["test_loss"] == pytest.approx(expected["test_loss"], abs=0.05)
    model = Lit("bfloat16")
    t.fit(model, data(), ckpt_path=file)
    t.save_checkpoint(later)
    assert t.current_epoch == 2
    assert model.embed.weight.dtype == torch.bfloat16
    ll.load_adapter(Lit(), later)
    again = Lit("bfloat16")
    ll.load_adapter(again, later)
    assert_same_state(again, model)
    loaded = ll.load_from_checkpoint(Lit, file, dtype="bfloat16")
    assert loaded.embed.weight.dtype == torch.bfloat16


def test_adapters_go_onto_whatever_fits_if_one_says_so(file: Path) -> None:
    ll.load_adapter(LitTiny(), file, check_base=False)  # without a word
    model = LitTiny()
    add_to(model.embed.weight, 1)
    with pytest.warns(
        ll.LoRAWarning, match=r"1 of 3 .* differ, such as 'embed.weight'\. They were"
    ):
        ll.load_adapter(model, file, check_base=False)
    assert_same_tensors(ll.adapter_state_dict(model), ll.adapter_state_dict(trained()))
    larger = LitTiny()
    larger.more = nn.Linear(2, 2)
    with pytest.warns(ll.LoRAWarning, match="3 frozen tensors, LitTiny has 5"):
        ll.load_adapter(larger, file, check_base=False)
    sizes = r"is \(2, 8\)|is \(4, 8\)|is \(8,\)|\(8, 2\)"
    narrow = LitTiny(width=6)
    with pytest.warns(match="another architecture"), refused(narrow, Exception, sizes):
        ll.load_adapter(narrow, file, check_base=False)


def test_a_checkpoint_goes_onto_whatever_fits_if_one_says_so(checkpoint: Path) -> None:
    with pytest.raises(ll.BaseMismatchError):
        ll.load_from_checkpoint(Lit, checkpoint, more=1.0)
    with pytest.warns(ll.LoRAWarning, match="1 of 4 frozen tensors of Lit differ"):
        ll.load_from_checkpoint(Lit, checkpoint, more=1.0, check_base=False)

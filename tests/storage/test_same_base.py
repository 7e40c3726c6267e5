"""A base is recognised in another precision."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.support.compared import assert_same_state, assert_same_tensors
from tests.support.models import LitTiny, X, data, lora, trainer
from tests.support.storage import CONFIG, fitted, refused, saved, trained

CONVERTED = "trained on a base in .* is in .* It is the same base, converted"
DTYPES = {
    "double": torch.float64,
    "single": torch.float32,
    "bfloat": torch.bfloat16,
    "half": torch.float16,
}
converted = pytest.mark.filterwarnings(f"ignore:.*{CONVERTED}:lightning_lora.LoRAWarning")


@pytest.mark.parametrize("here", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("there", DTYPES.values(), ids=DTYPES)
def test_a_base_is_recognised_if_one_was_converted_to_the_other(tmp_path: Path, there: Any, here: Any) -> None:
    file = tmp_path / "a.safetensors"
    model = saved(file, LitTiny().to(there), **CONFIG.to_dict())
    other = LitTiny().to(here)
    if {there, here} == {
        torch.bfloat16,
        torch.float16,
    }:  # both were rounded, each in its way
        with refused(
            other,
            ll.BaseMismatchError,
            "3 of 3 frozen tensors.*rounded twice, or to float16 there",
        ):
            ll.load_adapter(other, file)
        return
    told = nullcontext([1]) if there == here else pytest.warns(ll.LoRAWarning, match=CONVERTED)
    if there == torch.float64 != here:  # adapters are never rounded
        with told, refused(other, ll.AdapterMismatchError, "'q_proj.lora_A' is torch"):
            ll.load_adapter(other, file)
        return
    with told as seen:
        ll.load_adapter(other, file)
    assert len(seen) == 1
    assert torch.allclose(other(X).double(), model(X).double(), atol=0.1)
    assert other.embed.weight.dtype == other.head.weight.dtype == here
    assert other.q_proj.lora_A.dtype == (torch.float64 if here == torch.float64 else torch.float32)


@converted
def test_what_was_rounded_to_one_half_precision_is_recognised_in_the_other(tmp_path: Path) -> None:
    """Published weights in bfloat16, loaded as float16 on a card without it; or the other way round."""
    for first, second in (torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16):
        for there, here in (first, second), (second, first):
            saved(
                tmp_path / "a.safetensors",
                LitTiny().to(first).to(there),
                **CONFIG.to_dict(),
            )
            for model in (LitTiny().to(first).to(here), LitTiny().to(first)):
                ll.load_adapter(model, tmp_path / "a.safetensors")


def test_in_its_own_precision_a_base_is_compared_to_the_bit(file: Path) -> None:
    model = LitTiny().bfloat16().float()  # which is the same after rounding
    with refused(model, ll.BaseMismatchError, "another base: 3 of 3"):
        ll.load_adapter(model, file)


def test_what_was_trained_in_full_is_converted_but_not_to_infinity(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.head.weight[0, 0] = 1e6
    ll.save_adapter(model, tmp_path / "a.safetensors")
    with (
        pytest.warns(match=CONVERTED),
        refused(other := LitTiny().half(), Exception, "'head.weight' is"),
    ):
        ll.load_adapter(other, tmp_path / "a.safetensors")
    other = LitTiny().bfloat16()
    with pytest.warns(ll.LoRAWarning, match=CONVERTED):
        ll.load_adapter(other, tmp_path / "a.safetensors")
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
    model = fitted(file, Lit())
    expected = trainer(tmp_path).test(model, data(), verbose=False)[0]["test_loss"]
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=2, enable_checkpointing=False)
    found = t.test(Lit("bfloat16"), data(), ckpt_path=file, verbose=False)[0]["test_loss"]
    assert found == pytest.approx(expected, abs=0.05)
    model = Lit("bfloat16")
    t.fit(model, data(), ckpt_path=file)
    later = tmp_path / "later.ckpt"
    t.save_checkpoint(later)
    assert t.current_epoch == 2
    assert model.embed.weight.dtype == torch.bfloat16
    for again in (Lit(), Lit("bfloat16")):
        ll.load_adapter(again, later)
    assert_same_state(again, model)
    assert ll.load_from_checkpoint(Lit, file, dtype="bfloat16").embed.weight.dtype == torch.bfloat16


def test_adapters_go_onto_whatever_fits_if_one_says_so(file: Path, checkpoint: Path) -> None:
    ll.load_adapter(LitTiny(), file, check_base=False)  # without a word
    model = LitTiny()
    with torch.no_grad():
        model.embed.weight.add_(1)
    with pytest.warns(ll.LoRAWarning, match=r"1 of 3 .* differ, such as 'embed.weight'\. They were"):
        ll.load_adapter(model, file, check_base=False)
    assert_same_tensors(ll.adapter_state_dict(model), ll.adapter_state_dict(trained()))
    larger = LitTiny()
    larger.more = nn.Linear(2, 2)
    with pytest.warns(ll.LoRAWarning, match="3 frozen tensors, LitTiny has 5"):
        ll.load_adapter(larger, file, check_base=False)
    sizes = r"is \(2, 8\)|is \(4, 8\)|is \(8,\)|\(8, 2\)"
    with (
        pytest.warns(match="another architecture"),
        refused(model := LitTiny(width=6), Exception, sizes),
    ):
        ll.load_adapter(model, file, check_base=False)
    with pytest.raises(ll.BaseMismatchError):
        ll.load_from_checkpoint(Lit, checkpoint, more=1.0)
    with pytest.warns(ll.LoRAWarning, match="1 of 4 frozen tensors of Lit differ"):
        ll.load_from_checkpoint(Lit, checkpoint, more=1.0, check_base=False)

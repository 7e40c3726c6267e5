"""What training changes besides adapters is stored and restored."""

import copy
import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.compared import assert_same_state, assert_same_tensors, assert_state
from tests.support.fits import resumes_to_the_bit
from tests.support.models import LitTiny, best, data, lora, randomise, state, trainer


def is_kept_when_added(model: Any, name: str) -> bool:
    """Whether a buffer that comes before an injection is the base's, not what training changed."""
    model[0].register_buffer(name, torch.ones(2))
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    return f"0.{name}" not in ll.adapter_state_dict(model)


def test_buffers_are_the_bases_as_they_are_while_something_is_new() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert is_kept_when_added(model, "at_first")
    assert is_kept_when_added(model, "before_training")
    randomise(model)
    assert not is_kept_when_added(model, "in_training")
    model.append(nn.Linear(4, 4))
    assert is_kept_when_added(model, "beside_a_new_layer")


class Odd(nn.Module):
    """Buffers of all kinds: sparse, expanded, not finite, flags, a number, one that grows, and a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.other = nn.BatchNorm1d(3)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("rows", torch.eye(3).to_sparse_csr())
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("nan", torch.tensor([float("nan"), float("-inf"), -0.0]))
        self.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("bank", torch.zeros(0, 4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("waves", torch.fft.fft(torch.arange(4.0)).conj())


FACTORS = {"linear.lora_A", "linear.lora_B"}


STATISTICS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_buffers_that_changed_are_stored_and_others_are_restored(
    tmp_path: Path,
) -> None:
    model = Odd()
    ll.inject_adapters(model, ll.LoRAConfig(r=1))
    fresh = copy.deepcopy(ll.adapter_state_dict(model))
    assert fresh.keys() == FACTORS
    model.count += 1
    model.flags.logical_not_()
    for buffer in model.norm.buffers():
        buffer.add_(1)
    assert ll.adapter_state_dict(model).keys() == FACTORS | STATISTICS | {
        "count",
        "flags",
    }
    ll.save_adapter(model, tmp_path / "a.safetensors")
    again = Odd()
    ll.load_adapter(again, tmp_path / "a.safetensors")
    assert_same_tensors(ll.adapter_state_dict(again), ll.adapter_state_dict(model))
    ll.load_adapter_state_dict(again, fresh)
    assert again.count == 0
    assert not again.norm.running_mean.any()
    assert ll.adapter_state_dict(again).keys() == FACTORS
    model.bank = torch.ones(3, 4)
    ll.remove_adapters(model)
    assert model.bank.shape == (0, 4)
    assert model.count == 0
    assert type(model.linear) is nn.Linear


class Codebook(LitTiny):
    """Training changes much here that no optimizer does: a codebook, a counter, and a normalised weight."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            self.codes = nn.Parameter(torch.randn(4, 8), requires_grad=False)
            self.mix = nn.utils.spectral_norm(nn.Linear(8, 8))
        self.register_buffer("usage", torch.zeros(4))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, index: Tensor) -> Tensor:
        x = self.mix(self.embed(index))
        nearest = (x[:, None] - self.codes).square().sum(2).argmin(1)
        if self.training:
            with torch.no_grad():
                self.codes.lerp_(x[nearest.argmin()], 0.1)
                self.usage[nearest] += 1
                self.seen += 1
        return self.head(
            torch.tanh(self.q_proj(x)) + self.v_proj(x) + self.codes[nearest]
        )


def codebook_lora(**kwargs: Any) -> L.Callback:
    return lora(target_modules=["q_proj", "v_proj"], **kwargs)


def test_what_other_code_changes_is_stored_and_restored(tmp_path: Path) -> None:
    model = Codebook()
    checkpoint = best(tmp_path / "a", monitor=None)
    t = trainer(tmp_path, [codebook_lora(merge=False), checkpoint])
    t.fit(model, data(), data())
    stored = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert {"codes", "usage", "seen", "mix.weight_u"} <= set(stored)
    assert stored.keys().isdisjoint(
        {"embed.weight", "q_proj.weight", "mix.weight_orig"}
    )
    again = Codebook()
    ll.load_adapter(again, checkpoint.best_model_path)
    assert_same_state(again, model)
    ll.save_adapter(again, tmp_path / "again.safetensors")
    third = Codebook()
    ll.load_adapter(third, tmp_path / "again.safetensors")
    assert_same_state(third, model)
    with ll.disable_adapters(third):
        assert torch.equal(third.codes, Codebook().codes)
    ll.remove_adapters(third)
    assert_same_state(third, Codebook())


@pytest.mark.parametrize(
    ("merge", "precision"), [("last", "bf16-true"), (False, "32-true")]
)
def test_a_run_whose_base_changes_resumes_bit_for_bit(
    tmp_path: Path, merge: Any, precision: Any
) -> None:
    make = partial(codebook_lora, merge=merge)
    model = resumes_to_the_bit(
        tmp_path, Codebook, make, at="epoch=1", max_epochs=4, precision=precision
    )
    before = state(model)
    file = tmp_path / "through" / "epoch=3.ckpt"

    def tested(model: Codebook) -> Any:
        t = trainer(tmp_path, [make()], precision=precision)
        return t.test(model, data(), ckpt_path=file, verbose=False)

    assert tested(model) == tested(Codebook())
    assert_state(model, before)


def test_a_weight_that_the_model_has_lost_is_freed_when_its_base_is_read(
    tmp_path: Path,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    lost = weakref.ref(model.pop(1).weight)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    gc.collect()
    assert lost() is None


class ChangesLate(LitTiny):
    """A module whose own code changes a frozen weight after the first epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.embed.weight.data.mul_(0.9)


def test_values_that_are_in_no_file_are_not_made_up(tmp_path: Path) -> None:
    model = ChangesLate()
    t = trainer(tmp_path, [lora(), best(tmp_path, monitor=None, save_top_k=-1)])
    t.fit(model, data())
    first = min(tmp_path.glob("*.ckpt"))
    with pytest.raises(ll.BaseMismatchError, match=r"'embed.weight'.*anew"):
        ll.load_adapter(model, first)

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


def test_buffers_are_the_bases_as_they_are_while_something_is_new() -> None:
    model = nn.Sequential(nn.Linear(4, 4))

    def kept_when_added(name: str) -> bool:
        model[0].register_buffer(name, torch.ones(2))
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
        return f"0.{name}" not in ll.adapter_state_dict(model)  # as what training changed is

    assert kept_when_added("at_first")
    assert kept_when_added("before_training")
    randomise(model)
    assert not kept_when_added("in_training")
    model.append(nn.Linear(4, 4))
    assert kept_when_added("beside_a_new_layer")


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


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_buffers_that_changed_are_stored_and_others_are_restored(tmp_path: Path) -> None:
    model = Odd()
    factors = {"linear.lora_A", "linear.lora_B"}
    ll.inject_adapters(model, ll.LoRAConfig(r=1))
    fresh = copy.deepcopy(ll.adapter_state_dict(model))
    assert set(fresh) == factors
    model.count += 1
    model.flags.logical_not_()
    changed = [f"norm.{name}" for name, _ in model.norm.named_buffers()]
    for buffer in model.norm.buffers():
        buffer.add_(1)
    assert set(ll.adapter_state_dict(model)) - factors == {"count", "flags", *changed}
    ll.save_adapter(model, tmp_path / "a.safetensors")
    again = Odd()
    ll.load_adapter(again, tmp_path / "a.safetensors")
    assert_same_tensors(ll.adapter_state_dict(again), ll.adapter_state_dict(model))
    ll.load_adapter_state_dict(again, fresh)
    assert again.count == 0
    assert not again.norm.running_mean.any()
    assert set(ll.adapter_state_dict(again)) == factors
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
        return self.head(torch.tanh(self.q_proj(x)) + self.v_proj(x) + self.codes[nearest])


def codebook_lora(**kwargs: Any) -> L.Callback:
    return lora(target_modules=["q_proj", "v_proj"], **kwargs)


def test_what_other_code_changes_is_stored_and_restored(tmp_path: Path) -> None:
    model = Codebook()
    checkpoint = best(tmp_path / "a", monitor=None)
    t = trainer(tmp_path, [codebook_lora(merge=False), checkpoint])
    t.fit(model, data(), data())
    stored = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert {"codes", "usage", "seen", "mix.weight_u"} <= set(stored)
    assert stored.keys().isdisjoint({"embed.weight", "q_proj.weight", "mix.weight_orig"})
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


@pytest.mark.parametrize(("merge", "precision"), [("last", "bf16-true"), (False, "32-true")])
def test_a_run_whose_base_changes_resumes_bit_for_bit(tmp_path: Path, merge: Any, precision: Any) -> None:
    make = partial(codebook_lora, merge=merge)
    model = resumes_to_the_bit(tmp_path, Codebook, make, at="epoch=1", max_epochs=4, precision=precision)
    before = state(model)
    tested = []
    for each in (model, Codebook()):
        t = trainer(tmp_path, [make()], precision=precision)
        tested += t.test(each, data(), ckpt_path=tmp_path / "through" / "epoch=3.ckpt", verbose=False)
    assert tested[0] == tested[1]
    assert_state(model, before)


def test_a_weight_that_the_model_has_lost_is_freed_when_its_base_is_read(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["0"]))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    lost = weakref.ref(model.pop(1).weight)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    gc.collect()
    assert lost() is None


def test_values_that_are_in_no_file_are_not_made_up(tmp_path: Path) -> None:
    class Late(LitTiny):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.embed.weight.data.mul_(0.9)

    t = trainer(tmp_path, [lora(), best(tmp_path, monitor=None, save_top_k=-1)])
    model = Late()
    t.fit(model, data())
    with pytest.raises(ll.BaseMismatchError, match=r"'embed.weight'.*anew"):
        ll.load_adapter(model, min(tmp_path.glob("*.ckpt")))

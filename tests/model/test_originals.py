"""What training changes besides adapters is stored and restored."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.models import LitTiny, best, data, lora, randomise, same, state, trainer


def test_buffers_are_the_bases_as_they_are_while_something_is_new() -> None:
    model = nn.Sequential(nn.Linear(4, 4))

    def kept_when_added(name: str) -> bool:
        model[0].register_buffer(name, torch.ones(2))
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
        model[0].get_buffer(name).add_(1)
        return f"0.{name}" in ll.adapter_state_dict(model)

    assert kept_when_added("at_first") and kept_when_added("before_training")
    randomise(model)
    assert not kept_when_added("in_training")
    model.append(nn.Linear(4, 4))
    assert kept_when_added("beside_a_new_layer")


class Odd(nn.Module):
    """Buffers of all kinds: sparse, expanded, NaN, empty, a number, one that grows, and a view."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm, self.other = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("expanded", torch.ones(1).expand(4))
        self.register_buffer("nan", torch.tensor([float("nan")]))
        self.register_buffer("bank", torch.zeros(0, 4))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("waves", torch.fft.fft(torch.arange(4.0)).conj())


def test_buffers_that_changed_are_stored_and_others_are_restored(tmp_path: Path) -> None:
    model, factors = Odd(), {"linear.lora_A", "linear.lora_B"}
    ll.inject_adapters(model, ll.LoRAConfig(r=1))
    fresh = copy.deepcopy(ll.adapter_state_dict(model))
    assert set(fresh) == factors
    model.count += 1
    for buffer in model.norm.buffers():
        buffer.add_(1)
    assert set(ll.adapter_state_dict(model)) - factors == {"count", *(f"norm.{name}" for name in model.norm._buffers)}
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.load_adapter(again := Odd(), tmp_path / "a.safetensors")
    assert same(ll.adapter_state_dict(again), ll.adapter_state_dict(model))
    ll.load_adapter_state_dict(again, fresh)
    assert again.count == 0 and not again.norm.running_mean.any() and set(ll.adapter_state_dict(again)) == factors
    model.bank = torch.ones(3, 4)
    ll.remove_adapters(model)
    assert model.bank.shape == (0, 4) and model.count == 0 and type(model.linear) is nn.Linear


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
    model, checkpoint = Codebook(), best(tmp_path / "a", monitor=None)
    t = trainer(tmp_path, [codebook_lora(merge=False), checkpoint])
    t.fit(model, data(), data())
    stored = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    assert {"codes", "usage", "seen", "mix.weight_u"} <= set(stored)
    assert stored.keys().isdisjoint({"embed.weight", "q_proj.weight", "mix.weight_orig"})
    again = Codebook()
    ll.load_adapter(again, checkpoint.best_model_path)
    assert same(state(again), state(model))
    ll.save_adapter(again, tmp_path / "again.safetensors")
    third = Codebook()
    ll.load_adapter(third, tmp_path / "again.safetensors")
    assert same(state(third), state(model))
    with ll.disable_adapters(third):
        assert torch.equal(third.codes, Codebook().codes)
    ll.remove_adapters(third)
    assert same(state(third), state(Codebook()))


@pytest.mark.parametrize(("merge", "precision"), [("last", "bf16-true"), (False, "32-true")])
def test_a_run_whose_base_changes_resumes_bit_for_bit(tmp_path: Path, merge: Any, precision: Any) -> None:
    def run(folder: str, epochs: int, ckpt: Any = None) -> tuple[Codebook, L.Trainer]:
        torch.manual_seed(0)
        model = Codebook()
        callbacks = [codebook_lora(merge=merge), best(tmp_path / folder, monitor=None)]
        t = trainer(tmp_path, callbacks, max_epochs=epochs, precision=precision)
        t.fit(model, data(), ckpt_path=ckpt)
        return model, t

    whole, t = run("whole", 4)
    _, first = run("part", 2)
    path = first.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    resumed, _ = run("part", 4, path)
    assert same(state(resumed), state(whole))
    before = state(whole)
    tested = t.test(whole, data(), ckpt_path="best", verbose=False)
    assert same(state(whole), before)
    fresh = trainer(tmp_path, [codebook_lora()], precision=precision)
    assert fresh.test(Codebook(), data(), ckpt_path=t.checkpoint_callback.best_model_path, verbose=False) == tested  # type: ignore[union-attr]


def test_values_that_are_in_no_file_are_not_made_up(tmp_path: Path) -> None:
    class Late(LitTiny):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.embed.weight.data.mul_(0.9)

    model, checkpoint = Late(), best(tmp_path, monitor=None, save_top_k=-1)
    t = trainer(tmp_path, [lora(), checkpoint])
    t.fit(model, data())
    first, second = sorted(tmp_path.glob("*.ckpt"))
    t.test(model, data(), ckpt_path=second, verbose=False)
    with pytest.raises(ll.BaseMismatchError, match=r"'embed.weight'.*anew"):
        t.test(model, data(), ckpt_path=first, verbose=False)
    trainer(tmp_path, [lora()]).test(LitTiny(), data(), ckpt_path=first, verbose=False)


class Rows(nn.Module):
    """A layer of sequences or images, run on rows of features."""

    def __init__(self, inner: nn.Module, run: Any) -> None:
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


class Anything(L.LightningModule):
    """A random model: layers, norms and loose parameters and buffers, some of which training changes by itself."""

    def __init__(self, layers: list[str], drifting: list[str]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            self.embed = nn.Embedding(20, 4)
            kinds: dict[str, Any] = {
                "linear": lambda: nn.Linear(4, 4),
                "norm": lambda: nn.BatchNorm1d(4),
                "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
                "convolution": lambda: Rows(nn.Conv1d(4, 4, 1), lambda layer, x: layer(x[..., None])[..., 0]),
                "attention": lambda: Rows(nn.MultiheadAttention(4, 2), lambda layer, x: layer(x, x, x)[0]),
            }
            self.layers = nn.Sequential(nn.Linear(4, 4), *(kinds[kind]() for kind in layers))
            self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
            self.trains = nn.Parameter(torch.randn(4))
        self.register_buffer("real", torch.tensor([-0.0, 1.0, float("-inf"), 3.0]))
        self.register_buffer("integer", torch.zeros(2, dtype=torch.long))
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("gone", torch.zeros(1), persistent=False)
        self.drifting = drifting

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            for name in self.drifting:
                tensor = {**dict(self.named_parameters()), **dict(self.named_buffers())}[name]
                tensor.logical_not_() if tensor.dtype is torch.bool else tensor.add_(1)
        return (self.layers(self.embed(batch[0])) * self.trains + self.frozen).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


DRIFTING = ["frozen", "trains", "real", "integer", "flag", "gone", "embed.weight"]
ADAPTED = ("linear", "convolution", "attention")
METHODS: list[dict[str, Any]] = [{}, {"init": "olora", "use_rslora": True}, {"dropout": 0.5}]


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A state in which -0.0 and 0.0, and every NaN, are told apart."""
    return {name: value.contiguous().reshape(-1).view(torch.uint8) for name, value in state(model).items()}


@settings(max_examples=15, derandomize=True)
@given(
    layers=st.lists(st.sampled_from([*ADAPTED, "norm", "spectral"]), max_size=4),
    method=st.sampled_from(METHODS),
    drifting=st.lists(st.sampled_from(DRIFTING), unique=True),
    whole=st.booleans(),
    bias=st.sampled_from(["none", "all", "lora_only"]),
)
def test_restoring_gives_the_full_state_whatever_the_model(
    tmp_path_factory: pytest.TempPathFactory,
    layers: list[str],
    method: dict[str, Any],
    drifting: list[str],
    whole: bool,
    bias: Any,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    model = Anything(layers, drifting)
    adapted = [(i, kind) for i, kind in enumerate(["linear", *layers]) if kind in ADAPTED]
    targets = [f"layers.{i}" if kind == "linear" else f"layers.{i}.inner" for i, kind in adapted]
    config = {"target_modules": targets, "bias": bias, "modules_to_save": ["embed"] if whole else None, "merge": False}
    t = trainer(folder, [lora(**config, **method)], max_epochs=1, enable_checkpointing=False)
    t.fit(model, data())
    t.save_checkpoint(folder / "lora.ckpt")
    again = Anything(layers, drifting)
    ll.load_adapter(again, folder / "lora.ckpt")
    assert same(bits(again), bits(model))
    stored = torch.load(folder / "lora.ckpt", weights_only=True)["state_dict"]
    assert "layers.0.weight" not in stored and ("embed.weight" in stored) == (whole or "embed.weight" in drifting)

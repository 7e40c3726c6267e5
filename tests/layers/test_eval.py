"""Evaluation computes what training trained, and a restored model is the trained one, bit for bit."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_lora import (
    AdapterStateError,
    BaseMismatchError,
    LoRAConfig,
    TargetError,
    disable_adapters,
    inject_adapters,
    load_adapter,
    load_from_checkpoint,
    merge_adapters,
    remove_adapters,
    save_adapter,
    unmerge_adapters,
)
from tests.models import LitTiny, best, data, lora, randomise, same, state, trainer

X = torch.arange(20)


class Normed(LitTiny):
    """A classifier with batch norms among its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.norm.running_mean.fill_(0.3)  # type: ignore[union-attr]
        self.last = nn.BatchNorm1d(4, affine=False)

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        return self.last(self.head(self.norm(torch.tanh(self.q_proj(x)) + self.v_proj(x))))


# Every way of running is one function


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["1.linear1"], ["0.linear2"]])
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_are_adapted_in_eval_and_inference_mode(targets: Any, norm_first: bool, padded: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).double()
    x = torch.randn(3, 5, 8, dtype=torch.double)
    padding = torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]]) if padded else None
    kept = ~padding if padding is not None else slice(None)
    base = model(x, src_key_padding_mask=padding)[kept]
    inject_adapters(model, LoRAConfig(r=2, target_modules=targets))
    randomise(model)
    expected = model(x, src_key_padding_mask=padding)[kept]
    assert not torch.allclose(expected, base)
    model.eval()
    torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)
    merge_adapters(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (3, 4)),
        (nn.BatchNorm2d(4, affine=False), (3, 4, 2, 2)),
        (nn.BatchNorm3d(4, momentum=None), (3, 4, 2, 2, 2)),
        (nn.SyncBatchNorm(4), (3, 4, 2)),
        (nn.InstanceNorm1d(4, track_running_stats=True), (3, 4, 5)),
    ],
)
def test_frozen_norm_does_not_drift_and_trains_as_it_evaluates(norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = nn.ModuleDict({"norm": norm, "linear": nn.Linear(4, 4)})
    kind, before, x = type(norm), state(norm), torch.randn(shape)
    inject_adapters(model, LoRAConfig(r=2))
    model.train()
    trained = norm(x)
    assert norm.training and same(state(norm), before)
    assert torch.equal(trained, norm.eval()(x))
    again = copy.deepcopy(model)
    assert torch.equal(again["norm"].train()(x), trained) and same(state(again["norm"]), before)
    remove_adapters(model)
    assert type(norm) is kind
    norm.train()(x)
    assert not same(state(norm), before)


def test_norm_that_is_named_trains_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4)), nn.BatchNorm1d(4))
    inject_adapters(model, LoRAConfig(r=2, modules_to_save=["1", "2"]))
    before = state(model)
    model(torch.randn(8, 4))
    after = state(model)
    moved = {name for name in before if not torch.equal(after[name], before[name])}
    assert moved == {f"{name}.{part}" for name in ("1", "2.0") for part in list(model[1]._buffers)}


def test_norm_without_statistics_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4))
    inject_adapters(model, LoRAConfig(r=2))
    assert [type(module) for module in model[1:]] == [nn.BatchNorm1d, nn.LayerNorm]


def test_norms_stand_still_in_a_fit_and_are_plain_after_it(tmp_path: Path) -> None:
    model = Normed()
    before = state(model)
    trainer(tmp_path, [lora()]).fit(model, data(), data())
    assert type(model.norm) is nn.BatchNorm1d and type(model.last) is nn.BatchNorm1d
    norms = {name: value for name, value in state(model).items() if name.startswith(("norm", "last"))}
    assert same(norms, {name: before[name] for name in norms})


# Restoring gives the whole state


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
    load_adapter(again, checkpoint.best_model_path)
    assert same(state(again), state(model))
    save_adapter(again, tmp_path / "again.safetensors")
    third = Codebook()
    load_adapter(third, tmp_path / "again.safetensors")
    assert same(state(third), state(model))
    with disable_adapters(third):
        assert torch.equal(third.codes, Codebook().codes)
    remove_adapters(third)
    assert same(state(third), state(Codebook()))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
@pytest.mark.parametrize("merge", ["last", False])
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
    with pytest.raises(BaseMismatchError, match=r"'embed.weight'.*anew"):
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
                "layer_norm": lambda: nn.LayerNorm(4),
                "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
                "dropout": lambda: nn.Dropout(0.2),
                "convolution": lambda: Rows(nn.Conv1d(4, 4, 1), lambda layer, x: layer(x[..., None])[..., 0]),
                "lstm": lambda: Rows(nn.LSTM(4, 4), lambda layer, x: layer(x)[0]),
                "attention": lambda: Rows(nn.MultiheadAttention(4, 2), lambda layer, x: layer(x, x, x)[0]),
                "bilinear": lambda: Rows(nn.Bilinear(4, 4, 4), lambda layer, x: layer(x, x)),
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


ADAPTED = ("linear", "convolution", "lstm", "attention", "bilinear")
METHODS: list[dict[str, Any]] = [{}, {"init": "pissa"}, {"init": "olora", "use_rslora": True}, {"dropout": 0.5}]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layers=st.lists(st.sampled_from([*ADAPTED, "norm", "layer_norm", "spectral", "dropout"]), max_size=4),
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
    load_adapter(again, folder / "lora.ckpt")
    assert same(bits(again), bits(model))
    stored = torch.load(folder / "lora.ckpt", weights_only=True)["state_dict"]
    assert "layers.0.weight" not in stored and ("embed.weight" in stored) == (whole or "embed.weight" in drifting)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A state in which -0.0 and 0.0, and every NaN, are told apart."""
    return {name: value.contiguous().reshape(-1).view(torch.uint8) for name, value in state(model).items()}


def test_two_modules_that_share_layers_do_not_take_them_from_each_other(tmp_path: Path) -> None:
    one, two = LitTiny(), LitTiny()
    two.embed, two.q_proj, two.v_proj = one.embed, one.q_proj, one.v_proj
    t = trainer(tmp_path, [lora(), best(tmp_path)])
    t.fit(one, data(), data())
    trainer(tmp_path, [lora(merge=False)]).fit(two, data())
    before = state(two)
    with pytest.raises(AdapterStateError, match=r"'q_proj', 'v_proj' of LitTiny have the adapters of another model"):
        t.test(one, data(), ckpt_path="best", verbose=False)
    assert same(state(two), before)
    remove_adapters(two)
    t.test(one, data(), ckpt_path="best", verbose=False)


def test_a_merged_module_inside_another_is_a_base_as_it_is(tmp_path: Path) -> None:
    inner, outer = LitTiny(), LitTiny()
    trainer(tmp_path, [lora()]).fit(inner, data())
    outer.inner = inner
    before = state(outer)
    inject_adapters(outer, LoRAConfig(r=2, modules_to_save=["head"]))
    with disable_adapters(outer):
        assert all(torch.equal(value, before[name]) for name, value in state(outer).items() if name in before)
    remove_adapters(outer)
    assert same(state(outer), before)


def test_a_state_of_adapters_is_not_half_loaded_into_the_merged_module(tmp_path: Path) -> None:
    model, checkpoint = LitTiny(), best(tmp_path)
    trainer(tmp_path, [lora(), checkpoint]).fit(model, data(), data())
    before, stored = state(model), torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
    with pytest.raises(AdapterStateError, match="only half of it could be loaded"):
        model.load_state_dict(stored, strict=False)
    assert same(state(model), before)
    unmerge_adapters(model)
    model.load_state_dict(stored, strict=False)
    assert same({name: state(model)[name] for name in stored}, stored)


def test_parameters_of_no_layer_train_if_they_are_named(tmp_path: Path) -> None:
    class Tempered(LitTiny):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

        def forward(self, index: Tensor) -> Tensor:
            return super().forward(index) * self.temperature

    model, checkpoint = Tempered(), ModelCheckpoint(tmp_path, "a")
    trainer(tmp_path, [lora(modules_to_save=["head", "temperature"]), checkpoint]).fit(model, data())
    assert model.temperature != 1
    again = load_from_checkpoint(Tempered, tmp_path / "a.ckpt", merge=True)
    assert same(state(again), state(model))
    with pytest.raises(TargetError, match=r"'temprature'.*'temperature'"):
        inject_adapters(Tempered(), LoRAConfig(r=2, modules_to_save=["head", "temprature"]))
    names = inject_adapters(LitTiny(), LoRAConfig(r=2, modules_to_save=["head", "q_proj.weight"]))
    assert names == ("v_proj",)  # its weight trains whole, and needs no adapter

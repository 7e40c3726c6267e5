"""The whole merged model, for code that does not know adapters."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import lightning_lora as ll
from lightning_lora.model.record import find_record
from tests.support.cases import three
from tests.support.faults import unchanged
from tests.support.models import Around, LitTiny, TinyLM, X, as_trained, data, lora, same, state, trainer
from tests.support.storage import refused, trained


def merged(model: nn.Module) -> dict[str, Any]:
    """The state of a merged copy."""
    ll.merge_adapters(model := copy.deepcopy(model))
    return state(model)


class Adds(LitTiny):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["mine"] == 1


@pytest.mark.parametrize("is_merged", [False, True])
def test_checkpoint_is_a_plain_one_with_the_merged_weights(tmp_path: Path, is_merged: bool) -> None:
    model = as_trained(Adds(width=6))
    expected, output = merged(model), model(X)
    if is_merged:
        ll.merge_adapters(model)
    with unchanged(model):
        ll.save_merged(model, file := tmp_path / "a.ckpt")
    stored = torch.load(file, weights_only=True)
    assert not any("lora" in name for name in (*stored, *stored["state_dict"]))
    plain = Adds.load_from_checkpoint(file)
    assert same(state(plain), expected) and plain.hparams == model.hparams and find_record(plain) is None
    torch.testing.assert_close(plain(X), output)
    trainer(tmp_path).test(LitTiny(width=6), data(), ckpt_path=file, verbose=False)


def with_norms() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4))
    model.register_buffer("mine", torch.ones(3))
    return as_trained(model, r=2, target_modules="all")


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "plain": three,
    "DoRA": partial(three, use_dora=True, exclude_modules=["embed"]),
    "norms": with_norms,
    "half precision": lambda: as_trained(LitTiny().bfloat16(), r=2, target_modules="all"),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_tensors_are_those_of_a_merge(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    (tmp_path / "other").touch()
    with unchanged(model := build()):
        ll.save_merged(model, tmp_path / "a.safetensors")
    stored, expected = load_file(tmp_path / "a.safetensors"), merged(model)
    assert stored.keys() == expected.keys() and all(torch.equal(stored[name], expected[name]) for name in stored)
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode  # others may read it


def test_a_layer_with_two_names_is_merged_under_both(tmp_path: Path) -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    ll.save_merged(model := as_trained(nn.ModuleDict({"a": layer, "b": layer})), tmp_path / "a.safetensors")
    load_model(again := nn.ModuleDict({"a": other, "b": other}), tmp_path / "a.safetensors")
    assert same(state(again), merged(model))


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_a_tied_weight_is_written_once_unless_it_has_an_update(tmp_path: Path, target: str) -> None:
    model, is_own = as_trained(TinyLM(), r=2, target_modules=[target]), target == "lm_head"
    with pytest.warns(ll.LoRAWarning, match="they are two weights now") if is_own else nullcontext():
        ll.save_merged(model, tmp_path / "a.safetensors")
    assert {"lm_head.weight", "embed.weight"}.issubset(load_file(tmp_path / "a.safetensors")) == is_own
    load_model(again := TinyLM(tied=not is_own), tmp_path / "a.safetensors")
    torch.testing.assert_close(again(X), model(X))
    assert model.lm_head.weight is model.embed.weight


# Folders


class LitGPT2(Around):
    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            config = GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
            super().__init__(GPT2LMHeadModel(config).eval())

    def forward(self, index: torch.Tensor) -> Any:
        return self.model(index[None]).logits


@pytest.mark.parametrize("is_merged", [False, True])
def test_folder_is_that_of_the_model_inside(tmp_path: Path, is_merged: bool) -> None:
    model = as_trained(LitGPT2(), r=2, target_modules=["c_attn", "c_proj"], modules_to_save=["ln_f"])
    output = model(X[:8])
    if is_merged:
        ll.merge_adapters(model)
    with unchanged(model):
        ll.save_merged(model, tmp_path / "gpt2-1.0")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2-1.0").eval()
    torch.testing.assert_close(again(X[None, :8]).logits, output)
    assert [path.name for path in tmp_path.iterdir()] == ["gpt2-1.0"]


def test_folder_would_tie_a_head_again_that_has_an_update_of_its_own(tmp_path: Path) -> None:
    model = as_trained(LitGPT2(), r=2, target_modules=["lm_head"])
    with refused(model, ll.AdapterFileError, r"tie_word_embeddings = False"):
        ll.save_merged(model, tmp_path / "a")
    model.model.config.tie_word_embeddings = False
    with pytest.warns(ll.LoRAWarning, match="they are two weights now"):
        ll.save_merged(model, tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a").eval()
    torch.testing.assert_close(again(X[None, :8]).logits, model(X[:8]))


def test_folder_holds_no_part_that_was_trained_outside(tmp_path: Path) -> None:
    model = LitGPT2()
    model.head = nn.Linear(8, 2)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["c_attn"], modules_to_save=["head"]))
    with refused(model, ll.AdapterFileError, "'head.weight', 'head.bias' were trained outside of it"):
        ll.save_merged(model, tmp_path / "a")


class Own(nn.Module):
    """A model whose save_pretrained asks the model itself for its state."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.fails = False

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.state_dict(), folder / "weights.pt")
        if self.fails:
            raise OSError("disk full")


def test_folder_by_a_model_of_another_library_is_there_complete_or_not_at_all(tmp_path: Path) -> None:
    model, folder = as_trained(Own(), r=2), tmp_path / "a"
    model.fails = True
    with refused(model, ll.AdapterFileError, "disk full"):
        ll.save_merged(model, folder)
    assert not list(tmp_path.iterdir())
    model.fails = False
    folder.mkdir()
    ll.save_merged(model, folder)
    assert same(torch.load(folder / "weights.pt", weights_only=True), merged(model))
    assert "net.lora_A" in model.state_dict()
    with refused(model, ll.AdapterFileError, "not an empty folder"):
        ll.save_merged(model, folder)
    assert [path.name for path in folder.iterdir()] == ["weights.pt"]


# What is refused


def plain(layer: nn.Module | None = None, value: float | None = None) -> nn.Module:
    """A model of one layer with an adapter, perhaps of one value."""
    model = as_trained(nn.Sequential(layer or nn.Linear(4, 4)))
    if value is not None:
        model[0].lora_A.data.fill_(value)
        model[0].lora_B.data.fill_(value)
    return model


class Named(nn.Linear):
    """A layer whose state dict has names of its own."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}kernel"] = destination.pop(f"{prefix}weight")


def changed() -> nn.Module:
    ll.merge_adapters(model := trained())
    model.q_proj.weight.data.add_(1)
    return model


def disabled() -> nn.Module:
    ll.set_adapter(model := trained(), None)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, type[Exception], str]] = {
    "not Lightning": (plain, "a.ckpt", ll.AdapterFileError, r"not a LightningModule.*\.safetensors.*save_pretrained"),
    "no save_pretrained": (trained, "folder", ll.AdapterFileError, r"no save_pretrained.*\.ckpt.*\.safetensors"),
    "unknown ending": (trained, "a.pt", ll.AdapterFileError, r"\.ckpt.*\.safetensors.*save_pretrained"),
    "on meta": (lambda: plain().to("meta"), "a.safetensors", ll.AdapterStateError, "meta device"),
    "diverged": (lambda: plain(value=torch.nan), "a.safetensors", ll.AdapterStateError, "NaN"),
    "disabled": (disabled, "a.ckpt", ll.AdapterStateError, "shows its base"),
    "changed": (changed, "a.ckpt", ll.AdapterStateError, "were changed since"),
    "infinite": (lambda: plain(nn.Linear(4, 4).half(), 1e3), "a.safetensors", ll.AdapterStateError, "torch.float16"),
    "other names": (lambda: plain(Named(4, 4)), "a.safetensors", ll.AdapterStateError, "not hold '0.weight' under"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_written_is_refused(tmp_path: Path, case: Any) -> None:
    make, name, error, match = case
    with pytest.raises(error, match=match):
        ll.save_merged(make(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_readers_of_adapters_say_what_the_file_is(tmp_path: Path) -> None:
    model = trained()
    for file in ("merged.ckpt", "merged.safetensors"):
        ll.save_merged(model, tmp_path / file)
    torch.save(LitTiny().state_dict(), tmp_path / "state.pt")
    for name, says in (
        ("merged.ckpt", r"6 tensors.*no adapters.*a whole model, such as save_merged.*load_from_checkpoint"),
        ("merged.safetensors", r"6 tensors.*'embed.weight'.*safetensors.torch.load_model\(model, path\)"),
        ("state.pt", r"6 tensors.*a whole model.*load_state_dict"),
    ):
        with pytest.raises(ll.AdapterFileError, match=says):
            ll.load_adapter(LitTiny(), tmp_path / name)
        with pytest.raises(ll.AdapterFileError, match=says):
            ll.load_from_checkpoint(LitTiny, tmp_path / name)


def test_a_fit_says_that_the_file_is_its_base_and_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = trained()
    ll.save_merged(model, tmp_path / "merged.ckpt")
    ll.save_merged(model, tmp_path / "merged.safetensors")
    t = trainer(tmp_path, [lora(merge=False)], max_epochs=1, enable_checkpointing=False)
    with caplog.at_level("INFO"):
        t.fit(LitTiny(), data(), ckpt_path=tmp_path / "merged.ckpt")
    assert "merged.ckpt holds a full model and no adapters" in caplog.text
    with pytest.raises(ll.AdapterFileError, match=r"If save_merged wrote it, .*safetensors.torch.load_model"):
        t.fit(LitTiny(), data(), ckpt_path=tmp_path / "merged.safetensors")

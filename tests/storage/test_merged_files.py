"""The whole merged model, for code that does not know adapters."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

import lightning_lora as ll
from lightning_lora.model.records import find_record
from tests.support.cases import file_names, three
from tests.support.compared import assert_holds, assert_state
from tests.support.faults import unchanged
from tests.support.models import (
    LitTiny,
    TinyLM,
    X,
    as_trained,
    data,
    lora,
    state,
    trainer,
)
from tests.support.parameters import nan_at
from tests.support.storage import trained


def merged(model: nn.Module) -> dict[str, Any]:
    """The state of a merged copy."""
    model = copy.deepcopy(model)
    ll.merge_adapters(model)
    return state(model)


class Adds(LitTiny):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["mine"] == 1


@pytest.mark.parametrize("is_merged", [False, True])
def test_checkpoint_is_a_plain_one_with_the_merged_weights(
    tmp_path: Path, is_merged: bool
) -> None:
    file = tmp_path / "a.ckpt"
    model = as_trained(Adds(width=6))
    expected = merged(model)
    output = model(X)
    if is_merged:
        ll.merge_adapters(model)
    with unchanged(model):
        ll.save_merged(model, file)
    stored = torch.load(file, weights_only=True)
    for name in (*stored, *stored["state_dict"]):
        assert "lora" not in name
    plain = Adds.load_from_checkpoint(file)
    assert_state(plain, expected)
    assert plain.hparams == model.hparams
    assert find_record(plain) is None
    torch.testing.assert_close(plain(X), output)
    trainer(tmp_path).test(LitTiny(width=6), data(), ckpt_path=file, verbose=False)


def with_norms() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LSTM(4, 4))
    model.register_buffer("mine", torch.ones(3))
    return as_trained(model, r=2, target_modules="all")


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "DoRA": partial(three, use_dora=True, exclude_modules=["embed"]),
    "norms": with_norms,
    "half precision": lambda: as_trained(
        LitTiny().bfloat16(), r=2, target_modules="all"
    ),
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)
def test_tensors_are_those_of_a_merge(
    tmp_path: Path, build: Callable[[], nn.Module]
) -> None:
    file = tmp_path / "a.safetensors"
    other = tmp_path / "other"
    other.touch()
    model = build()
    with unchanged(model):
        ll.save_merged(model, file)
    stored = load_file(file)
    expected = merged(model)
    assert stored.keys() == expected.keys()
    assert_holds(stored, expected)
    assert file.stat().st_mode == other.stat().st_mode  # others may read it


def test_a_layer_with_two_names_is_merged_under_both(tmp_path: Path) -> None:
    layer = nn.Linear(4, 4)
    other = nn.Linear(4, 4)
    model = as_trained(nn.ModuleDict({"a": layer, "b": layer}))
    ll.save_merged(model, tmp_path / "a.safetensors")
    again = nn.ModuleDict({"a": other, "b": other})
    load_model(again, tmp_path / "a.safetensors")
    assert_state(again, merged(model))


def test_a_tied_weight_is_written_once(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    model = as_trained(TinyLM(), r=2, target_modules=["q_proj"])
    ll.save_merged(model, file)
    assert len({"lm_head.weight", "embed.weight"} & load_file(file).keys()) == 1
    again = TinyLM()
    load_model(again, file)
    torch.testing.assert_close(again(X), model(X))
    assert model.lm_head.weight is model.embed.weight


def plain(layer: nn.Module | None = None, value: float | None = None) -> nn.Module:
    """A model of one layer with an adapter, perhaps of one value."""
    model = as_trained(nn.Sequential(layer or nn.Linear(4, 4)))
    if value is not None:
        model[0].lora_A.data.fill_(value)
        model[0].lora_B.data.fill_(value)
    return model


class Named(nn.Linear):  # a layer whose state dict has names of its own
    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}kernel"] = destination.pop(f"{prefix}weight")


def changed() -> nn.Module:
    model = trained()
    ll.merge_adapters(model)
    model.q_proj.weight.data.add_(1)
    return model


def disabled() -> nn.Module:
    model = trained()
    ll.set_adapter(model, None)
    return model


def test_a_tied_weight_with_an_update_is_written_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    model = as_trained(TinyLM(), r=2, target_modules=["lm_head"])
    with pytest.warns(ll.LoRAWarning, match="they are two weights now"):
        ll.save_merged(model, file)
    assert load_file(file).keys() >= {"lm_head.weight", "embed.weight"}
    again = TinyLM(tied=False)
    load_model(again, file)
    torch.testing.assert_close(again(X), model(X))
    assert model.lm_head.weight is model.embed.weight


def diverged_head() -> nn.Module:
    model = trained()
    nan_at(model.head.bias, 0)
    with pytest.raises(ll.AdapterStateError, match=r"head\.bias.* hold NaN"):
        ll.save_adapter(model, "never.safetensors")
    return model


class Refusing(nn.Sequential):
    def save_pretrained(self, folder: Path) -> None:
        raise ValueError("not serializable")


def from_gguf() -> nn.Module:
    model = as_trained(Refusing(nn.Linear(4, 4)))
    model.quantization_method = "gguf"
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, type[Exception], str]] = {
    "not Lightning": (
        plain,
        "a.ckpt",
        ll.AdapterFileError,
        r"not a LightningModule.*\.safetensors.*save_pretrained",
    ),
    "no save_pretrained": (
        trained,
        "folder",
        ll.AdapterFileError,
        r"no save_pretrained.*\.ckpt.*\.safetensors",
    ),
    "own refusal": (
        lambda: as_trained(Refusing(nn.Linear(4, 4))),
        "folder",
        ll.AdapterFileError,
        "serializable.*ckpt",
    ),
    "from GGUF": (
        from_gguf,
        "folder",
        ll.AdapterFileError,
        r"not serializable\)\. Nothing.*del model.config",
    ),
    "unknown ending": (
        trained,
        "a.pt",
        ll.AdapterFileError,
        r"\.ckpt.*\.safetensors.*save_pretrained",
    ),
    "on meta": (
        lambda: plain().to("meta"),
        "a.safetensors",
        ll.AdapterStateError,
        "meta device",
    ),
    "diverged": (
        lambda: plain(value=torch.nan),
        "a.safetensors",
        ll.AdapterStateError,
        "NaN",
    ),
    "diverged head": (
        diverged_head,
        "a.ckpt",
        ll.AdapterStateError,
        r"head\.bias.* hold NaN",
    ),
    "disabled": (disabled, "a.ckpt", ll.AdapterStateError, "shows its base"),
    "changed": (changed, "a.ckpt", ll.AdapterStateError, "were changed since"),
    "infinite": (
        lambda: plain(nn.Linear(4, 4).half(), 1e3),
        "a.safetensors",
        ll.AdapterStateError,
        "torch.float16",
    ),
    "other names": (
        lambda: plain(Named(4, 4)),
        "a.safetensors",
        ll.AdapterStateError,
        "not hold '0.weight' under",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_written_is_refused(tmp_path: Path, case: Any) -> None:
    make, name, error, match = case
    with pytest.raises(error, match=match):
        ll.save_merged(make(), tmp_path / name)
    assert not list(tmp_path.iterdir())


class Own(nn.Sequential):
    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True)  # as others do
        torch.save(self.state_dict(), folder / "model.bin")


@pytest.mark.parametrize("name", ["merged", "merged.safetensors"])
def test_urls_are_files_here_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = as_trained(Own(nn.Linear(4, 4)))
    with pytest.raises(ll.AdapterFileError, match="is elsewhere"):
        ll.save_merged(model, f"memory://bucket/{name}")
    ll.save_merged(model, f"file://{tmp_path}/{name}")
    assert file_names(tmp_path) == [name]


def test_a_state_dict_of_a_modules_own_stays(tmp_path: Path) -> None:
    model = as_trained(Own(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    own = model[1].state_dict = partial(model[1].state_dict)
    ll.save_merged(model, tmp_path / "merged")
    assert model[1].state_dict is own
    assert "state_dict" not in vars(model) | vars(model[0])


def test_urls_of_exports_are_folders_here_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = as_trained(Own(nn.Linear(4, 4)))
    ll.export_peft(model, f"file://{tmp_path}/peft")
    with pytest.raises(ll.AdapterFileError, match="is elsewhere"):
        ll.export_peft(model, "memory://bucket/peft")
    assert file_names(tmp_path) == ["peft"]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder of files of a whole model."""
    model = trained()
    ll.save_merged(model, tmp_path / "merged.ckpt")
    ll.save_merged(model, tmp_path / "merged.safetensors")
    torch.save(LitTiny().state_dict(), tmp_path / "state.pt")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("merged.ckpt", "load_from_checkpoint"),
        ("merged.safetensors", "load_model"),
        ("state.pt", ""),
    ],
)
def test_readers_of_adapters_say_what_the_file_is(
    whole: Path, name: str, says: str
) -> None:
    message = rf"6 tensors.*no adapters.*a whole model.*{says}"
    with pytest.raises(ll.AdapterFileError, match=message):
        ll.load_adapter(LitTiny(), whole / name)
    with pytest.raises(ll.AdapterFileError, match=message):
        ll.load_from_checkpoint(LitTiny, whole / name)


def test_a_trainer_says_what_loads_a_merged_file(whole: Path) -> None:
    t = trainer(whole, [lora()], max_epochs=1)
    message = r"If save_merged wrote it, .*safetensors.torch.load_model"
    with pytest.raises(ll.AdapterFileError, match=message):
        t.fit(LitTiny(), data(), ckpt_path=whole / "merged.safetensors")

"""A state holds what training changed, and is checked whole."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.support.cases import file_names
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.models import LitTiny, TinyLM, X, as_trained, lora, unties
from tests.support.parameters import cloned
from tests.support.storage import CONFIG, fitted, refused, restores, saved, trained

CHANGED_IN_TRAINING = {
    "q_proj.lora_A",
    "q_proj.lora_B",
    "v_proj.lora_A",
    "v_proj.lora_B",
    "q_proj.bias",
    "head.weight",
    "head.bias",
}


def test_state_holds_what_training_changed_and_is_the_same_merged(file: Path) -> None:
    model = trained()
    before = ll.adapter_state_dict(model)
    assert before.keys() == CHANGED_IN_TRAINING
    ll.merge_adapters(model)
    assert_same_tensors(ll.adapter_state_dict(model), before)
    ll.save_adapter(model, file)
    restores(file, trained())


STATE_CHANGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "base weight": (
        lambda s: s.update({"embed.weight": torch.zeros(20, 8)}),
        "unexpected 'embed.weight'",
    ),
    "renamed": (
        lambda s: s.update({"q_proj.lora_a": s.pop("q_proj.lora_A")}),
        "missing '.*_A' and unexpected '.*_a'",
    ),
    "shape": (
        lambda s: s.update({"q_proj.lora_A": torch.zeros(3, 8)}),
        r"\(3, 8\).*\(2, 8\)",
    ),
    "list": (
        lambda s: s.update({"q_proj.lora_A": [1.0]}),
        "is a list. Expected a tensor",
    ),
    "kind": (
        lambda s: s.update({"q_proj.lora_A": torch.zeros(2, 8, dtype=torch.int64)}),
        "int64",
    ),
}


@pytest.mark.parametrize(
    ("change", "message"), STATE_CHANGES.values(), ids=STATE_CHANGES
)
def test_state_that_does_not_fit_is_refused_and_nothing_is_written(
    change: Any, message: str
) -> None:
    bad = dict(ll.adapter_state_dict(trained()))
    change(bad)
    model = as_trained(LitTiny(), **CONFIG.to_dict())
    with refused(model, ll.AdapterMismatchError, message):
        ll.load_adapter_state_dict(model, bad)


def test_state_with_nan_is_refused_and_nothing_is_written() -> None:
    bad = cloned(ll.adapter_state_dict(trained()))
    bad["q_proj.lora_B"][0, 0] = torch.nan
    model = as_trained(LitTiny(), **CONFIG.to_dict())
    with refused(
        model, ll.AdapterFileError, "'q_proj.lora_B' hold NaN or infinite values"
    ):
        ll.load_adapter_state_dict(model, bad)


class Slim(LitTiny):
    """A module that leaves all but its head out of its state."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if "head" in name}


def test_what_trains_is_stored_whatever_the_model_leaves_out_of_its_state(
    tmp_path: Path,
) -> None:
    model = saved(tmp_path / "a.safetensors", Slim(), **CONFIG.to_dict())
    again = LitTiny()
    ll.load_adapter(again, tmp_path / "a.safetensors")
    assert torch.equal(again(X), model(X))


@unties
def test_an_embedding_that_trains_whole_is_stored_as_it_is_though_its_other_use_is_merged(
    tmp_path: Path,
) -> None:
    base = TinyLM()
    model = as_trained(
        deepcopy(base), target_modules=["lm_head"], modules_to_save=["embed"]
    )
    model.embed.weight.data.add_(1)
    live = cloned(ll.adapter_state_dict(model))
    ll.merge_adapters(model)
    assert not torch.equal(model.lm_head.weight, model.embed.weight)
    merged = ll.adapter_state_dict(model)
    assert merged.keys() == live.keys()
    assert_holds(merged, live)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    ll.unmerge_adapters(model)
    again = restores(tmp_path / "a.safetensors", model, base)
    assert again.lm_head.weight is again.embed.weight


@pytest.mark.parametrize("write", [ll.save_adapter, ll.export_peft])
def test_a_layer_with_the_scaling_of_another_model_is_not_written(
    tmp_path: Path, write: Any
) -> None:
    model = LitTiny()
    other = LitTiny()
    ll.inject_adapters(other, ll.LoRAConfig(r=2, alpha=32))
    ll.inject_adapters(model, ll.LoRAConfig(r=2, alpha=4))
    write(model, tmp_path / "own.safetensors")
    model.q_proj = other.q_proj
    message = "'q_proj' of LitTiny have another rank or scaling than its config"
    with pytest.raises(ll.AdapterStateError, match=message):
        write(model, tmp_path / "a.safetensors")
    assert file_names(tmp_path) == ["own.safetensors"]


@pytest.mark.parametrize("write", [ll.save_adapter, ll.export_peft])
def test_adapters_without_values_are_not_written(tmp_path: Path, write: Any) -> None:
    with torch.device("meta"):
        model = LitTiny()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(
        ll.AdapterStateError,
        match=r"'q_proj\.lora_A', .* are on the meta device and have no values",
    ):
        write(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


class Normed(LitTiny):
    """With running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)


class Masked(Normed):
    """And with a parameter that holds infinite values from the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.mask = nn.Parameter(torch.tensor([0.0, -torch.inf]))


NORMED: dict[str, Any] = {
    "r": 2,
    "target_modules": ["q_proj"],
    "modules_to_save": ["norm"],
}


class Overflows(Normed):
    """A module whose statistics become NaN, as in a step that a scaler skips."""

    def on_train_batch_end(self, *_: Any) -> None:
        self.norm(torch.full((3, 8), torch.nan))


def test_statistics_that_are_not_finite_are_not_written_or_loaded(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.ckpt"
    model = fitted(path, Overflows(), lora(**NORMED, merge=False))
    of_the_model = r"'norm\.running_mean', 'norm\.running_var' of Overflows hold NaN"
    with pytest.raises(ll.AdapterStateError, match=of_the_model):
        ll.save_adapter(model, tmp_path / "a.safetensors")
    plain = Normed()
    with refused(
        plain, ll.AdapterFileError, "'norm.running_mean', 'norm.running_var' hold NaN"
    ):
        ll.load_adapter(plain, path)


def test_infinite_values_of_the_base_are_no_sign_of_a_diverged_run(
    tmp_path: Path,
) -> None:
    model: Any = Masked()
    ll.inject_adapters(model, ll.LoRAConfig(**NORMED))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    restores(tmp_path / "a.safetensors", model, Masked())
    with torch.no_grad():
        model.norm.mask[0] = torch.inf
    with pytest.raises(
        ll.AdapterStateError, match=r"'norm\.mask' of Masked hold NaN or infinite"
    ):
        ll.save_adapter(model, tmp_path / "a.safetensors")


class Filled(LitTiny):
    """A module whose set-up gives a buffer another shape and dtype, as from data."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self.mean = torch.tensor(0.5, dtype=torch.float64)


class Refuses(Filled):
    """A module whose own loading refuses that buffer."""

    def _load_from_state_dict(self, state: Any, *args: Any) -> None:
        if state["mean"].dtype is torch.float64:
            raise RuntimeError("It has no place here.")
        super()._load_from_state_dict(state, *args)


def test_a_buffer_has_its_own_form_again_if_the_loading_of_a_module_fails(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.ckpt"
    fitted(path, Filled(), lora(merge=False))
    model = Refuses()
    with refused(model, RuntimeError, "It has no place here"):
        ll.load_adapter(model, path)

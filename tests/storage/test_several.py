"""Sums of adapters: shown by set_adapter, or kept by combine_adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.compared import assert_state
from tests.support.models import LitTiny, data, state, trainer
from tests.support.parameters import base_keys, chosen, trainable
from tests.support.peft_export import read

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class Layers(nn.Module):
    """Layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.words = nn.Embedding(8, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        words = self.words(torch.arange(len(x)))
        x = self.b(torch.tanh(self.a(x))) + words
        output, _ = self.lstm(x[None])
        return output[0]


CONFIGS = {
    "style": ll.LoRAConfig(r=2, alpha=6, target_modules="all"),
    "subject": ll.LoRAConfig(r=3, target_modules=["b", "lstm"], use_rslora=True),
    "pissa": ll.LoRAConfig(r=2, target_modules=["a"], init="pissa"),
}


def several(*names: str, build: Any = Layers, **others: ll.LoRAConfig) -> nn.Module:
    """A model with trained adapters, the last one active."""
    torch.manual_seed(0)
    model: nn.Module = build()
    configs = {**CONFIGS, **others}
    for name in names:
        ll.inject_adapters(model, configs[name], name=name)
        for p in trainable(model):
            p.data += 0.3 * torch.randn_like(p)
    return model


def two_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items()}


def base_of(model: nn.Module) -> dict[str, Tensor]:
    with ll.set_adapter(model, None):
        return wide(chosen(model.state_dict(), base_keys(model)))


def adapters_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    with ll.set_adapter(model, name):
        return wide(ll.adapter_state_dict(model))


def merged_with(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The weights of the model with this adapter merged into them."""
    with ll.set_adapter(model, name):
        ll.merge_adapters(model)
        merged = wide(state(model))
        ll.unmerge_adapters(model)
    return merged


def with_sum(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    """The base plus the sum of these updates."""
    base = base_of(model)
    expected = dict(base)
    for name, weight in weights.items():
        merged = merged_with(model, name)
        for key, value in base.items():
            expected[key] = expected[key] + weight * (merged[key] - value)
    return expected


def test_several_names_show_the_sum_of_their_updates() -> None:
    model = several(*CONFIGS)
    names = {"style": 0.7, "subject": -1.2, "pissa": 1.0}
    base = Layers().double()
    base.load_state_dict(with_sum(model, names))
    with ll.set_adapter(model, names):
        assert ll.adapters(model)[0] == "0.7 style + -1.2 subject + 1 pissa"
        shown = model(X)
        assert torch.allclose(shown, base(X.double()).float(), atol=1e-5)
        ll.merge_adapters(model)
        assert torch.allclose(model(X), shown, atol=1e-5)
        ll.unmerge_adapters(model)
        assert trainable(model) == []
    assert ll.adapters(model)[0] == "pissa"
    assert trainable(model) != []


def test_many_sums_leave_few_behind_and_none_is_stale() -> None:
    model = several("style", "subject")
    for number in (*range(20), 3):
        ll.set_adapter(model, {"style": number / 10, "subject": 1})
    assert ll.adapters(model)[0] == "0.3 style + 1 subject"
    assert len(ll.adapters(model)) < 13
    again = model(X)
    ll.set_adapter(model, "style")
    for p in trainable(model):
        p.data *= 2
    ll.set_adapter(model, "0.3 style + 1 subject")
    assert not torch.equal(model(X), again)  # it is made anew
    ll.set_adapter(model, ["subject", "subject"])
    assert ll.adapters(model)[0] == "2 subject"


def test_blocks_of_sums_show_what_was_shown_before() -> None:
    model = several("style", "subject")
    ll.set_adapter(model, None)
    nearly = {"style": 0.7000001, "subject": 1}
    with ll.set_adapter(model, ["style", "subject"]):
        first = model(X)
        with ll.set_adapter(model, {"style": 0.5}), ll.set_adapter(model, nearly):
            assert not torch.equal(model(X), first)
        assert torch.equal(model(X), first)
    assert not torch.equal(model(X), first)


def test_a_block_of_the_sum_that_is_shown_leaves_it_shown() -> None:
    model = several("style", "subject")
    names = ["style", "subject"]
    ll.set_adapter(model, names)
    shown = ll.adapters(model)[0]
    with ll.set_adapter(model, names):
        assert ll.adapters(model)[0] == shown
    assert ll.adapters(model)[0] == shown


def ranks(factors: dict[str, Tensor]) -> set[int]:
    """The ranks of all layers, by their lora_A."""
    return {len(factor) for name, factor in factors.items() if "lora_A" in name}


@pytest.mark.parametrize(("r", "of_the_sum"), [(None, 5), (3, 3)])
def test_a_sum_may_be_kept_as_an_adapter(
    tmp_path: Path, r: int | None, of_the_sum: int
) -> None:
    model = several("style", "subject")
    ll.combine_adapters(model, {"style": 0.7, "subject": 0.3}, name="both", r=r)
    assert ll.adapters(model) == ("subject", "style", "both")
    with ll.set_adapter(model, {"style": 0.7, "subject": 0.3}):
        shown = model(X)
    with ll.set_adapter(model, "both"):
        assert torch.equal(model(X), shown) is (r is None)
        assert trainable(model) != []
        ll.save_adapter(model, tmp_path / "both.safetensors")
        ours = model(X)
    assert ranks(adapters_of(model, "both")) <= {of_the_sum, 2, 3}
    other = several()
    ll.load_adapter(other, tmp_path / "both.safetensors")
    assert torch.equal(other(X), ours)


TWO = {"one": ll.LoRAConfig(r=2, alpha=6), "two": ll.LoRAConfig(r=3)}


def test_sums_are_exported(tmp_path: Path) -> None:
    model = several("one", "two", build=two_linear, **TWO)
    base = two_linear().double()
    base.load_state_dict(base_of(model))
    with ll.set_adapter(model, {"one": 0.7, "two": 0.3}):
        ll.export_peft(model, tmp_path)
        shown = model(X)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5
    theirs = read(base, tmp_path)
    assert torch.allclose(theirs(X.double()).float(), shown, atol=1e-6)


def test_a_sum_is_not_trained(tmp_path: Path) -> None:
    model: Any = several("one", "two", build=LitTiny, **TWO)
    ll.set_adapter(model, ["one", "two"])
    before = state(model)
    message = r"a sum of adapters, '1 one \+ 1 two', which is not trained"
    with pytest.raises(ll.AdapterStateError, match=message):
        trainer(tmp_path, [ll.LoRACallback()], max_epochs=1).fit(model, data())
    assert_state(model, before)
    trainer(tmp_path, [ll.LoRACallback(name="one")], max_epochs=1).fit(model, data())
    assert ll.adapters(model)[0] == "one"


@pytest.mark.parametrize(
    ("names", "odd", "error", "message"),
    [
        ([], {}, ll.ConfigError, "Expected numbers by the names of adapters"),
        ({"style": float("nan")}, {}, ll.ConfigError, "finite"),
        (
            {"style": 1, "stile": 1},
            {},
            ll.AdapterStateError,
            "no adapter 'stile'.* Did you mean 'style'",
        ),
        (
            ["style", "odd"],
            {"use_dora": True},
            ll.AdapterMismatchError,
            "'odd' of Layers uses DoRA",
        ),
        (
            ["style", "odd"],
            {"modules_to_save": ["words"]},
            ll.AdapterMismatchError,
            "of Layers also holds 'words",
        ),
        (
            ["style", "odd"],
            {"target_slices": {"b": {"x": [0, 4]}}},
            ll.AdapterMismatchError,
            "'b' is adapted in other",
        ),
    ],
)
def test_what_cannot_be_added_is_named_and_nothing_changes(
    names: Any, odd: Any, error: Any, message: str
) -> None:
    model = several("style", "odd", odd=ll.LoRAConfig(r=2, **odd))
    before = ll.adapters(model)
    shown = model(X)
    with pytest.raises(error, match=message):
        ll.set_adapter(model, names)
    assert ll.adapters(model) == before
    assert torch.equal(model(X), shown)


def test_sums_leave_layers_alone_whose_names_end_alike() -> None:
    config = ll.LoRAConfig(r=2, target_modules="a")

    def build() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(8, 8), "block": Layers()})

    model = several("one", "two", build=build, one=config, two=config)
    with ll.set_adapter(model, ["one", "two"]):
        assert set(ll.adapter_state_dict(model)) == {"a.lora_A", "a.lora_B"}


@pytest.mark.parametrize("active", ["v1.0 beta", "0.5 v1.0 beta"])
def test_a_sum_has_the_names_as_they_are_and_replaces_no_adapter(active: str) -> None:
    model = several("v1.0 beta", **{"v1.0 beta": CONFIGS["style"]})
    with ll.set_adapter(model, {"v1.0 beta": 2}):
        assert ll.adapters(model)[0] == "2 v1.0 beta"
    ll.combine_adapters(model, {"v1.0 beta": 1}, name="0.5 v1.0 beta")
    ll.set_adapter(model, active)
    with pytest.raises(ll.AdapterStateError, match="has the name of this sum"):
        ll.set_adapter(model, {"v1.0 beta": 0.5})
    assert ll.adapters(model)[0] == active
    assert len(ll.adapters(model)) == 3


def update_of(model: nn.Module, name: str) -> Tensor:
    """B A of the one layer."""
    factors = adapters_of(model, name)
    return factors["0.lora_B"] @ factors["0.lora_A"]


def test_a_sum_of_half_precision_adapters_is_rounded_once() -> None:
    config = ll.LoRAConfig(r=2, autocast_adapter_dtype=False)

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8).bfloat16())

    model = several("one", "two", build=build, one=config, two=config)
    ll.combine_adapters(model, {"one": 0.7, "two": 0.3}, name="both")
    expected = 4 * (0.7 * update_of(model, "one") + 0.3 * update_of(model, "two"))
    error = update_of(model, "both") - expected
    assert error.norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize(
    ("weights", "r", "says"),
    [
        (["style"], None, "Expected numbers by the names"),
        ({"style": 1}, 2.5, r"rank=2.5"),
    ],
)
def test_a_kept_sum_needs_numbers_and_a_whole_rank(
    weights: Any, r: Any, says: str
) -> None:
    model = several("style", "subject")
    with pytest.raises(ll.ConfigError, match=says):
        ll.combine_adapters(model, weights, name="new", r=r)


def test_a_new_name_is_needed_and_a_merged_model_is_refused() -> None:
    model = several("style", "subject")
    with pytest.raises(ll.AdapterStateError, match="has an adapter 'style' already"):
        ll.combine_adapters(model, {"style": 1, "subject": 1}, name="style")
    ll.set_adapter(model, None)
    ll.combine_adapters(model, {"style": 1, "subject": 1}, name="both")
    assert "both" in ll.adapters(model)
    ll.set_adapter(model, "style")
    ll.merge_adapters(model)
    with pytest.raises(ll.AdapterStateError, match="merged"):
        ll.set_adapter(model, ["style", "subject"])

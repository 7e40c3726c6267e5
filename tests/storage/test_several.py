"""Sums of adapters: shown by set_adapter, or kept by combine_adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_lora import (
    AdapterMismatchError,
    AdapterStateError,
    ConfigError,
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    adapters,
    combine_adapters,
    export_peft,
    inject_adapters,
    load_adapter,
    merge_adapters,
    remove_adapters,
    save_adapter,
    save_merged,
    set_adapter,
    unmerge_adapters,
)
from tests.support.models import LitTiny, data, state, trainer

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


class Layers(nn.Module):
    """Layers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.words, self.lstm = nn.Embedding(8, 8), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.tanh(self.a(x))) + self.words(torch.arange(len(x)))
        return self.lstm(x[None])[0][0]


CONFIGS = {
    "style": LoRAConfig(r=2, alpha=6, target_modules="all"),
    "subject": LoRAConfig(r=3, target_modules=["b", "lstm"], use_rslora=True),
    "pissa": LoRAConfig(r=2, target_modules=["a"], init="pissa"),
}


def several(*names: str, build: Any = Layers, **others: LoRAConfig) -> nn.Module:
    """A model with trained adapters, the last one active."""
    torch.manual_seed(0)
    model: nn.Module = build()
    for name in names:
        inject_adapters(model, {**CONFIGS, **others}[name], name=name)
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p) * p.requires_grad
    return model


def updates(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What an adapter adds to each weight, in float64."""
    with set_adapter(model, name):
        merge_adapters(model)
        merged = state(model)
        unmerge_adapters(model)
    with set_adapter(model, None):
        base = {key: p for key, p in model.state_dict().items() if "lora_" not in key}
        return {key: merged[key].double() - value.double() for key, value in base.items()}


def test_several_names_show_the_sum_of_their_updates() -> None:
    model, names = several(*CONFIGS), {"style": 0.7, "subject": -1.2, "pissa": 1.0}
    expected: dict[str, Tensor] = {}
    for name, weight in names.items():
        for key, value in updates(model, name).items():
            expected[key] = expected.get(key, 0) + weight * value
    base = Layers()
    with set_adapter(model, None):
        base.load_state_dict({key: value for key, value in model.state_dict().items() if "lora_" not in key})
    base = base.double()
    for key, value in base.state_dict().items():
        value += expected[key]
    with set_adapter(model, names):
        assert adapters(model)[0] == "0.7 style + -1.2 subject + 1 pissa"
        shown = model(X)
        assert torch.allclose(shown, base(X.double()).float(), atol=1e-5)
        merge_adapters(model)
        assert torch.allclose(model(X), shown, atol=1e-5)
        unmerge_adapters(model)
        assert not any(p.requires_grad for p in model.parameters())
    assert adapters(model)[0] == "pissa" and any(p.requires_grad for p in model.parameters())
    with set_adapter(model, ["style", "subject"]), torch.no_grad():
        assert adapters(model)[0] == "1 style + 1 subject"


def test_many_sums_leave_few_behind_and_none_is_stale() -> None:
    model = several("style", "subject")
    for number in (*range(20), 3):
        set_adapter(model, {"style": number / 10, "subject": 1})
    assert adapters(model)[0] == "0.3 style + 1 subject" and len(adapters(model)) < 13
    again = model(X)
    set_adapter(model, "style")
    for p in model.parameters():
        p.data *= 1 + p.requires_grad
    set_adapter(model, "0.3 style + 1 subject")
    assert not torch.equal(model(X), again)  # it is made anew
    set_adapter(model, ["subject", "subject"])
    assert adapters(model)[0] == "2 subject"
    set_adapter(model, None)
    with set_adapter(model, {"style": 0.3, "subject": 1}):
        shown = model(X)
    assert not torch.equal(model(X), shown)


@pytest.mark.parametrize("r", [None, 3])
def test_a_sum_may_be_kept_as_an_adapter(tmp_path: Path, r: int | None) -> None:
    model = several("style", "subject")
    combine_adapters(model, {"style": 0.7, "subject": 0.3}, name="both", r=r)
    assert adapters(model) == ("subject", "style", "both")
    with set_adapter(model, {"style": 0.7, "subject": 0.3}):
        shown = model(X)
    with set_adapter(model, "both"):
        assert torch.equal(model(X), shown) is (r is None)
        assert any(p.requires_grad for p in model.parameters())
        save_adapter(model, tmp_path / "both.safetensors")
        ours = model(X)
    assert {len(p) for name, p in adapter_state_dict_of(model, "both").items() if "lora_A" in name} <= {r or 5, 2, 3}
    other = several()
    load_adapter(other, tmp_path / "both.safetensors")
    assert torch.equal(other(X), ours)


def adapter_state_dict_of(model: nn.Module, name: str) -> dict[str, Tensor]:
    with set_adapter(model, name):
        return adapter_state_dict(model)


def test_sums_are_those_of_peft_and_are_exported(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    configs = {"one": LoRAConfig(r=2, alpha=6), "two": LoRAConfig(r=3)}
    model = several("one", "two", build=build, **configs)
    for name in configs:
        with set_adapter(model, name):
            export_peft(model, tmp_path / name)
    torch.manual_seed(0)
    theirs = peft.PeftModel.from_pretrained(build(), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", adapter_name="two")
    for method, r in (("cat", None), ("svd", 2)):
        theirs.add_weighted_adapter(["one", "two"], [0.7, 0.3], method, combination_type=method, svd_rank=r)
        theirs.set_adapter(method)
        combine_adapters(model, {"one": 0.7, "two": 0.3}, name=method, r=r)
        with set_adapter(model, method):
            assert torch.allclose(model(X), theirs(X), atol=1e-5)
    with set_adapter(model, {"one": 0.7, "two": 0.3}):
        export_peft(model, tmp_path / "sum")
        save_merged(model, tmp_path / "merged.safetensors")
        shown = model(X)
    torch.manual_seed(0)
    read = peft.PeftModel.from_pretrained(base := build(), tmp_path / "sum")
    assert torch.allclose(read(X), shown, atol=1e-6)
    assert json.loads((tmp_path / "sum" / "adapter_config.json").read_text())["r"] == 5
    base = build()
    base.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert torch.allclose(base(X), shown, atol=1e-5)


def test_a_sum_is_not_trained(tmp_path: Path) -> None:
    model = several("one", "two", build=LitTiny, one=LoRAConfig(r=2), two=LoRAConfig(r=3))
    set_adapter(model, ["one", "two"])
    before = state(model)
    for name in (None, "1 one + 1 two"):
        lora = LoRACallback(**({"name": name} if name else {}))  # type: ignore[arg-type]
        with pytest.raises(AdapterStateError, match=r"shows a sum of adapters, '1 one \+ 1 two', which is not trained"):
            trainer(tmp_path, [lora], max_epochs=1).fit(model, data())  # type: ignore[arg-type]
    assert all(torch.equal(before[key], value) for key, value in state(model).items())
    trainer(tmp_path, [LoRACallback(name="one")], max_epochs=1).fit(model, data())  # type: ignore[arg-type]
    assert adapters(model)[0] == "one"


def named(**options: Any) -> dict[str, LoRAConfig]:
    return {"odd": LoRAConfig(r=2, **options)}


@pytest.mark.parametrize(
    ("names", "others", "error", "message"),
    [
        ([], {}, ConfigError, "Expected numbers by the names of adapters"),
        ({}, {}, ConfigError, "Expected numbers by the names of adapters"),
        ({"style": float("nan")}, {}, ConfigError, "finite"),
        ({"style": "much"}, {}, ConfigError, "Expected numbers"),
        ({"style": 1, "stile": 1}, {}, AdapterStateError, "no adapter 'stile'.* Did you mean 'style'"),
        (["style", "odd"], named(use_dora=True), AdapterMismatchError, "'odd' of Layers uses DoRA"),
        (["style", "odd"], named(modules_to_save=["words"]), AdapterMismatchError, "'odd' of Layers also holds 'words"),
        (["style", "odd"], named(target_slices={"b": {"x": [0, 4]}}), AdapterMismatchError, "'b' is adapted in other"),
    ],
)
def test_what_cannot_be_added_is_named_and_nothing_changes(names: Any, others: Any, error: Any, message: str) -> None:
    model = several("style", *others, **others)
    before, shown = adapters(model), model(X)
    with pytest.raises(error, match=message):
        set_adapter(model, names)
    assert adapters(model) == before and torch.equal(model(X), shown)


def test_sums_may_be_nested_and_hide_no_adapter_of_their_name() -> None:
    model = several("style", "subject")
    with set_adapter(model, ["style", "subject"]):
        first = model(X)
        with set_adapter(model, {"style": 0.5}), set_adapter(model, {"style": 0.7000001, "subject": 1}):
            pass
        assert torch.equal(model(X), first)
    other = several("style", "subject")
    inject_adapters(other, LoRAConfig(r=2), name="1 style + 1 subject")
    with pytest.raises(AdapterStateError, match="as the sum would be called"):
        set_adapter(other, ["style", "subject"])


def test_a_sum_of_half_precision_adapters_is_rounded_once() -> None:
    config = LoRAConfig(r=2, autocast_adapter_dtype=False)
    model = several("one", "two", build=lambda: nn.Sequential(nn.Linear(8, 8).bfloat16()), one=config, two=config)
    parts = {name: adapter_state_dict_of(model, name) for name in ("one", "two")}
    expected = sum(
        w * 4 * parts[n]["0.lora_B"].double() @ parts[n]["0.lora_A"].double() for n, w in (("one", 0.7), ("two", 0.3))
    )
    combine_adapters(model, {"one": 0.7, "two": 0.3}, name="both")
    both = adapter_state_dict_of(model, "both")
    found = both["0.lora_B"].double() @ both["0.lora_A"].double()
    assert (found - expected).norm() < 3e-3 * expected.norm()


def test_a_new_name_is_needed_and_a_merged_model_is_refused() -> None:
    model = several("style", "subject")
    with pytest.raises(AdapterStateError, match="has an adapter 'style' already"):
        combine_adapters(model, {"style": 1, "subject": 1}, name="style")
    set_adapter(model, None)
    combine_adapters(model, {"style": 1, "subject": 1}, name="both")
    assert "both" in adapters(model)
    set_adapter(model, "style")
    merge_adapters(model)
    with pytest.raises(AdapterStateError, match="merged"):
        set_adapter(model, ["style", "subject"])
    unmerge_adapters(model)
    remove_adapters(model, "both")
    for wrong in (["style"], {"style": None}, {None: 1}):
        with pytest.raises(ConfigError, match="Expected numbers by the names"):
            combine_adapters(model, wrong, name="new")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="name=None"):
        combine_adapters(model, {"style": 1}, name=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"rank=2.5"):
        combine_adapters(model, {"style": 1}, name="new", r=2.5)  # type: ignore[arg-type]

"""What PEFT cannot hold is refused by name, and nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GptOssConfig, GptOssModel

import lightning_lora as ll
from lightning_lora.layers import ADAPTERS
from lightning_lora.layers.each_kind.linear import LoRALinear
from tests.support.faults import contents, in_fork, limit, unchanged
from tests.support.layers import Scaled
from tests.support.models import LitTiny, TinyLM
from tests.support.parameters import trainable
from tests.support.peft_export import trained


def check_refused(
    source: Any,
    folder: Path,
    match: str,
    error: type[Exception] = ll.ExportError,
    **how: Any,
) -> None:
    """Expect an error, and no directory."""
    with pytest.raises(error, match=match):
        ll.export_peft(source, folder / "peft", **how)
    assert not (folder / "peft").exists()


class Reads(nn.Module):
    """It reads a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.own


class Nested(Reads):
    """So does a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Reads()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(super().forward(x))


OTHER: dict[str, Any] = {"target_modules": ["other"]}
SHARED = nn.Linear(4, 4)
CASES: list[tuple[nn.Module, dict[str, Any], str]] = [
    (nn.Bilinear(4, 4, 4), {}, "'layer': .*no counterpart for our adapter of Bilinear"),
    (
        nn.Conv2d(4, 4, 3, dilation=(1, 2)),
        {},
        r"'layer': .*dilation=.*1, 2.*exclude_modules",
    ),
    (
        nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"),
        {},
        "'layer': .*padding_mode='circular'",
    ),
    (
        nn.Conv2d(4, 4, 3, groups=2),
        {},
        "'layer': .*groups=2.*the channels of all groups",
    ),
    (Scaled(4, 4), {}, "'layer': .*Scaled has a forward of its own"),
    (
        nn.MultiheadAttention(4, 2),
        {},
        r"'layer': .*twice.*target_slices=\{'layer': \['q', 'k', 'v'\]\}",
    ),
    (
        nn.MultiheadAttention(4, 2, kdim=3),
        {"target_slices": {"layer": ["q"]}},
        "'layer': .*kdim or vdim",
    ),
    (
        nn.Sequential(nn.Linear(4, 4)),
        {**OTHER, "target_parameters": ["0.weight"]},
        "'layer': .*a layer inside it",
    ),
    (
        nn.Sequential(SHARED, SHARED),
        {},
        "'layer.0': the layer is used as 'layer.1' too",
    ),
    (
        Nested(),
        {**OTHER, "target_parameters": ["own"]},
        "'layer.inner': .*no parameters inside of 'layer'",
    ),
    (
        Nested(),
        {**OTHER, "target_parameters": ["layer.own"], "modules_to_save": ["inner"]},
        "'layer.inner', inside of",
    ),
    (
        nn.Linear(4, 4),
        {**OTHER, "modules_to_save": ["layer.weight"]},
        "no place for 'layer.weight'.*single parameters",
    ),
]


@pytest.mark.parametrize(("layer", "config", "match"), CASES)
def test_what_peft_lacks_or_computes_otherwise(
    layer: nn.Module, config: Any, match: str, tmp_path: Path
) -> None:
    base = nn.ModuleDict({"layer": layer, "other": nn.Linear(4, 4)})
    model = trained(base, ll.LoRAConfig(**{"r": 2, "target_modules": "all", **config}))
    check_refused(model, tmp_path, match)
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    check_refused(tmp_path / "adapter.safetensors", tmp_path, match)


class Own(nn.Linear):
    pass


def test_what_a_user_has_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoRALinear, "lora_layer_types", (nn.Linear,))
    monkeypatch.setitem(ADAPTERS, Own, LoRALinear)
    ll.register_adapter(Own, LoRALinear)
    model = trained(nn.Sequential(Own(4, 4)), ll.LoRAConfig(r=2))
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    for source in (model, tmp_path / "adapter.safetensors"):
        check_refused(
            source, tmp_path, "'0': PEFT has no counterpart for .*Own.*save_merged"
        )


def test_an_attention_of_torch_is_refused_with_the_argument_of_the_next_training(
    tmp_path: Path,
) -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    q_k_v = r"{'attn': \['q', 'k', 'v'\]}"
    check_refused(
        trained(model, ll.LoRAConfig(r=2)),
        tmp_path,
        f"'attn': .* twice. Train again with target_slices={q_k_v}, which leaves that",
    )


def test_names_in_modules_to_save_that_peft_reads_otherwise(tmp_path: Path) -> None:
    base = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("fc", "out_fc", "q")})
    model = trained(
        base, ll.LoRAConfig(r=2, target_modules=["q"], modules_to_save=["fc"])
    )
    check_refused(model, tmp_path, "'fc', and PEFT would also save 'out_fc'")
    model = trained(
        TinyLM(),
        ll.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    # it does not say whether they are one weight
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    check_refused(
        tmp_path / "adapter.safetensors",
        tmp_path,
        "no place for 'embed.weight'.*tied.*Load a file onto its",
    )


@torch.no_grad()
def test_values_that_peft_cannot_hold(tmp_path: Path) -> None:
    base: Any = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    model: Any = trained(base, ll.LoRAConfig(r=2))
    model.norm.running_mean.add_(1)
    check_refused(model, tmp_path, "no place for 'norm.running_mean'")
    model.norm.running_mean.sub_(1)
    model.q.lora_A[0, 0] = torch.nan
    check_refused(
        model, tmp_path, "'q.lora_A' in ModuleDict hold NaN", ll.AdapterFileError
    )


def test_what_is_asked_for_wrongly(tmp_path: Path) -> None:
    base = nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})
    check_refused(base, tmp_path, "has no adapters", ll.AdapterStateError)
    check_refused(3, tmp_path, "Expected a path", ll.AdapterFileError)
    ll.inject_adapters(base, ll.LoRAConfig(r=2, modules_to_save=["norm"]))
    check_refused(base, tmp_path, "not the module itself", root="q")
    check_refused(
        base,
        tmp_path,
        "root='1' holds no adapted layer.*layers are 'q'",
        ll.ConfigError,
        root="1",
    )
    check_refused(base, tmp_path / "none", "does not exist", FileNotFoundError)
    check_refused(
        base,
        tmp_path,
        "'a' is not known. Expected 'peft' or 'diffusers'",
        ll.ConfigError,
        format="a",
    )
    # without what is as in the base
    ll.save_adapter(base, tmp_path / "fresh.safetensors")
    check_refused(
        tmp_path / "fresh.safetensors",
        tmp_path,
        "does not hold 'norm.running_mean'.*export the model",
    )


def test_other_files_stay_and_a_model_does_not_change(tmp_path: Path) -> None:
    model = trained(LitTiny(), ll.LoRAConfig(r=3))
    (tmp_path / "README.md").write_text("a card")
    ll.export_peft(trained(LitTiny(), ll.LoRAConfig(r=2)), tmp_path)
    with unchanged(model):
        ll.export_peft(model, tmp_path)
    assert contents(tmp_path).keys() == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    with pytest.raises(ll.AdapterFileError, match="could not be written"):
        ll.export_peft(model, tmp_path / "README.md")


@pytest.mark.parametrize("room", [0, 1000, 2100])
@in_fork
def test_both_files_are_written_or_none(tmp_path: Path, room: int) -> None:
    old, new = (trained(LitTiny(), ll.LoRAConfig(r=r)) for r in (2, 9))
    ll.export_peft(old, tmp_path / "peft")
    before = contents(tmp_path)
    limit(room)
    for folder in ("peft", "fresh"):
        with pytest.raises(
            ll.AdapterFileError, match=r"could not be written .*Free space"
        ):
            ll.export_peft(new, tmp_path / folder)
    assert contents(tmp_path) == before
    assert not (tmp_path / "fresh").exists()


def test_one_expert_whose_weights_are_transposed(tmp_path: Path) -> None:
    experts: Any = {
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
        "intermediate_size": 16,
    }
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = GptOssConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=9, **experts, **heads
    )
    model = trained(
        GptOssModel(config),
        ll.LoRAConfig(r=2, target_modules=[], target_parameters=["down_proj"]),
    )
    check_refused(
        model,
        tmp_path,
        "experts': PEFT adds the update of one transposed expert the wrong way",
    )


def test_a_row_of_zeros_below_dora(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[1] = 0  # as a row that was pruned
    ll.inject_adapters(model, ll.LoRAConfig(r=2, use_dora=True))
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
    ll.save_adapter(model, tmp_path / "adapter.safetensors")
    for source in (model, tmp_path / "adapter.safetensors"):
        check_refused(
            source,
            tmp_path,
            "'0': with use_dora, PEFT scales an output whose magnitude is zero",
        )

"""A slice adapts its own rows and no others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import (
    AdapterMismatchError,
    ConfigError,
    LoRAConfig,
    TargetError,
    adapter_state_dict,
    inject_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
    unmerge_adapters,
)
from tests.support.models import randomise, same, state


class Fused(nn.Module):
    """An attention's projection as GPT-2 has it, and one that shares keys and values as Phi-3's does."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.qkv_proj, self.other = Conv1D(24, 8), nn.Linear(8, 16), nn.Linear(8, 6)
        self.config: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.c_attn(x), self.qkv_proj(x), self.other(x)], dim=-1)


def fused() -> Fused:
    torch.manual_seed(0)
    return Fused()


def changed_columns(model: nn.Module, base: nn.Module, x: Tensor) -> list[int]:
    return (model(x) != base(x)).any(dim=0).nonzero().flatten().tolist()


def test_slices_of_fused_projections_are_adapted_alone(tmp_path: Path) -> None:
    base, model, x = fused(), fused(), torch.randn(3, 8)
    slices = {"c_attn": ["v", "q"], "other": {"first": [1, 3]}}
    how = LoRAConfig(r=2, target_modules=["c_attn", "other"], target_slices=slices)
    inject_adapters(model, how)
    assert torch.equal(model(x), base(x))
    assert [n for n in model.state_dict() if "lora_B" in n] == [
        "c_attn.lora_B_q", "c_attn.lora_B_v", "other.lora_B_first",
    ]  # fmt: skip
    randomise(model)
    output = model(x)
    assert changed_columns(model, base, x) == [*range(8), *range(16, 24), 41, 42]
    update = model.c_attn.lora_B_v @ model.c_attn.lora_A_v
    torch.testing.assert_close(output[:, 16:24], base(x)[:, 16:24] + x @ update.T)
    merge_adapters(model)
    torch.testing.assert_close(model(x), output)
    rest = torch.ones(24, dtype=torch.bool)
    rest[:8], rest[16:] = False, False
    assert torch.equal(model.c_attn.weight[:, rest], base.c_attn.weight[:, rest])
    unmerge_adapters(model)
    output.sum().backward()
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(base, tmp_path / "a.safetensors")
    assert torch.equal(base(x), output)


def test_slices_choose_among_the_parts_of_a_layer_and_drop_the_rest() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    names = inject_adapters(
        model, LoRAConfig(r=2, target_modules=["self_attn"], target_slices={"self_attn": ["q", "v"]})
    )
    assert names == ("self_attn",)
    assert list(adapter_state_dict(model)) == [f"self_attn.lora_{f}_{p}" for p in "qv" for f in "AB"]
    with pytest.raises(AdapterMismatchError, match="matrices="):
        inject_adapters(model, LoRAConfig(r=2, target_modules=["self_attn"]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"target_slices": {"c_attn": ["z"]}}, "'c_attn' has no parts 'z'. It has 'q', 'k', 'v'"),
        ({"target_slices": {"other": ["q"]}}, r"The rows of 'q' in 'other', .* are not known.*\[first, end\]"),
        ({"target_slices": {"qkv_proj": ["q"]}}, "The rows of 'q' in 'qkv_proj'"),
        ({"target_slices": {"attn": ["q"]}}, r"target_slices \['attn'\] match no module.*c_attn"),
        ({"target_slices": {"c_attn": ["q"]}, "use_dora": True}, "without target_slices"),
        ({"target_slices": {"c_attn": ["q"], "net.c_attn": ["v"]}}, "match no module"),
        ({"target_slices": {"c_att.": ["q"], "c_attn": ["v"]}}, "'c_attn' has no effect on.*Put it first"),
    ],
    ids=str,
)
def test_slices_that_mean_nothing_are_refused(arguments: dict[str, Any], words: str) -> None:
    model = fused()
    before = state(model)
    with pytest.raises(TargetError, match=words):
        inject_adapters(model, LoRAConfig(r=2, target_modules=["c_attn", "qkv_proj", "other"], **arguments))
    assert same(state(model), before)


Rows = dict[str, list[int]]


def sliced(rows: Rows) -> LoRAConfig:
    return LoRAConfig(r=1, target_modules=["proj"], target_slices={"proj": rows})


def model() -> nn.ModuleDict:
    return nn.ModuleDict({"proj": nn.Linear(3, 6, dtype=torch.float64)})


def changed_rows(rows: Rows) -> list[int]:
    """Which features of a layer of six an update of these rows changes."""
    built, x = model(), torch.randn(5, 3, dtype=torch.float64)
    before = built["proj"](x)
    inject_adapters(built, sliced(rows))
    randomise(built, scale=1)
    return (built["proj"](x) != before).any(dim=0).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("rows", "changed"),
    [
        ({"a": [1, 3], "b": [3, 5]}, [1, 2, 3, 4]),
        ({"a": [3, 5], "b": [1, 3]}, [1, 2, 3, 4]),
        ({"a": [3, 4]}, [3]),
        ({"a": [0, 6]}, [0, 1, 2, 3, 4, 5]),
        ({"end": [4, 6], "start": [0, 1]}, [0, 4, 5]),
    ],
    ids=str,
)
def test_slices_change_their_rows_alone(rows: Rows, changed: list[int]) -> None:
    assert changed_rows(rows) == changed


@pytest.mark.parametrize(
    "rows", [{"a": [1, 4], "b": [3, 5]}, {"a": [3, 5], "b": [1, 4]}, {"a": [0, 6], "b": [2, 3]}], ids=str
)
def test_slices_that_share_one_row_are_refused(rows: Rows) -> None:
    with pytest.raises(ConfigError, match="parts that share rows"):
        sliced(rows)


def test_a_slice_of_one_row_too_many_is_refused_and_changes_nothing() -> None:
    built = model()
    with pytest.raises(TargetError, match="'proj' end beyond its 6 rows: 'b'"):
        inject_adapters(built, sliced({"a": [0, 2], "b": [2, 7]}))
    assert type(built["proj"]) is nn.Linear

"""Each projection of nn.MultiheadAttention has an update of its own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import ConfigError, LoRAConfig, TargetError, adapter_state_dict, inject_adapters
from lightning_lora.training.optimizers import train_adapters
from tests.support.models import randomise


class Attends(nn.Module):
    """An attention to something else, whose keys and values have few features."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, kdim=2, vdim=3, batch_first=True, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :2], x[..., :3])[0]


X = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 4, 6)


def names(model: nn.Module) -> set[str]:
    """The parts of the attention that are adapted."""
    return {name.rpartition("_")[2] for name in adapter_state_dict(model) if "lora_A_" in name}


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_each_projection_has_the_rank_asked_for_or_the_most_it_can_have(init: Any) -> None:
    torch.manual_seed(0)
    model = Attends().double()
    before = model(X)
    inject_adapters(model, LoRAConfig(r=4, alpha=4, init=init))
    shapes = {name.removeprefix("attention."): tuple(p.shape) for name, p in adapter_state_dict(model).items()}
    assert {name: shape for name, shape in shapes.items() if "0" not in name} == {
        "lora_A_q": (4, 6), "lora_B_q": (6, 4),
        "lora_A_k": (2, 2), "lora_B_k": (6, 2),
        "lora_A_v": (3, 3), "lora_B_v": (6, 3),
        "lora_A_out": (4, 6), "lora_B_out": (6, 4),
    }  # fmt: skip
    torch.testing.assert_close(model(X), before)


def test_a_rank_that_none_of_its_projections_can_have_is_refused() -> None:
    inject_adapters(Attends(), LoRAConfig(r=1, rank_pattern={"attention": 6}))
    with pytest.raises(ConfigError, match=r"'attention' \(r=7, at most 6\)"):
        inject_adapters(Attends(), LoRAConfig(r=1, rank_pattern={"attention": 7}))


def test_an_output_projection_that_is_excluded_leaves_the_other_three() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    inject_adapters(model, LoRAConfig(r=2, target_modules=["self_attn"], exclude_modules=["self_attn.out_proj"]))
    assert names(model) == {"q", "k", "v"}


def test_each_adapter_is_in_the_group_of_its_own_weight() -> None:
    attention = nn.MultiheadAttention(8, 2)
    model = nn.ModuleDict({"attention": attention})
    inject_adapters(model, LoRAConfig(r=2))
    weights = (attention.in_proj_weight, attention.out_proj.weight)
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    train_adapters(model, [optimizer])
    names = {id(p): name for name, p in attention.named_parameters()}
    held = [[names[id(p)][5:] for p in group["params"]] for group in optimizer.param_groups]
    assert held == [["A_q", "B_q", "A_k", "B_k", "A_v", "B_v"], ["A_out", "B_out"]]


def test_weights_that_train_whole_are_not_adapted_too() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    how: dict[str, Any] = {"r": 2, "target_modules": ["self_attn"]}
    inject_adapters(model, LoRAConfig(**how, modules_to_save=["self_attn.in_proj_weight"]))
    assert names(model) == {"out"} and model.self_attn.in_proj_weight.requires_grad
    every = ["self_attn.in_proj_weight", "self_attn.out_proj"]
    with pytest.raises(TargetError, match="select no layer of TransformerEncoderLayer"):
        inject_adapters(nn.TransformerEncoderLayer(8, 2, 16), LoRAConfig(**how, modules_to_save=every))


def test_rows_are_refused_where_the_parts_have_names() -> None:
    how = LoRAConfig(r=2, target_modules=["self_attn"], target_slices={"self_attn": {"q": [0, 8]}})
    with pytest.raises(TargetError, match=r"'self_attn', whose parts have names: 'q', 'k', 'v', 'out'\. Give a list"):
        inject_adapters(nn.TransformerEncoderLayer(8, 2, 16), how)


@pytest.mark.parametrize(("dtype", "why"), [(torch.int8, "not floating point"), (torch.float8_e4m3fn, "not compute")])
def test_an_output_projection_that_cannot_be_adapted_is_named(dtype: torch.dtype, why: str) -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    weight = model.self_attn.out_proj.weight
    model.self_attn.out_proj.weight = nn.Parameter(weight.data.to(dtype), requires_grad=False)
    with pytest.raises(TargetError, match=rf"its out_proj.weight is {dtype}, .*{why}"):
        inject_adapters(model, LoRAConfig(r=2, target_modules=["self_attn"]))


def test_an_update_of_one_projection_alone_is_in_its_own_rows() -> None:
    torch.manual_seed(0)
    plain, model = nn.MultiheadAttention(6, 2).double(), nn.ModuleDict()
    model["attention"] = nn.MultiheadAttention(6, 2).double()
    model["attention"].load_state_dict(plain.state_dict())
    inject_adapters(model, LoRAConfig(r=2, target_modules=["attention"], target_slices={"attention": ["v"]}))
    randomise(model)
    factors = adapter_state_dict(model)
    with torch.no_grad():
        plain.in_proj_weight[12:] += factors["attention.lora_B_v"] @ factors["attention.lora_A_v"]
    torch.testing.assert_close(model["attention"](X, X, X)[0], plain(X, X, X)[0])


def test_each_projection_starts_from_what_is_strongest_in_its_own_rows() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2)}).double()
    inject_adapters(model, LoRAConfig(r=2, init="pissa"))
    factors, rows = adapter_state_dict(model), model["attention"].in_proj_weight.detach().chunk(3)
    for part, matrix in zip("qkv", rows, strict=True):
        start = factors[f"attention.lora_B_{part}"] @ factors[f"attention.lora_A_{part}"]
        torch.testing.assert_close((matrix - start).norm(), torch.linalg.svdvals(matrix)[2:].norm())

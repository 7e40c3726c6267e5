"""A selection that cannot be adapted is refused, and a mistake is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_lora import LoRAConfig, TargetError, inject_adapters
from tests.support.faults import unchanged
from tests.support.layers import Linear
from tests.support.models import LitTiny, is_plain


def adapted(model: nn.Module, **config: Any) -> tuple[str, ...]:
    return inject_adapters(model, LoRAConfig(**{"r": 1, **config}))


def net(**modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(modules)


class Table(nn.Module):
    """A matrix that a module reads by itself, with parameters that are none beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.grid = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(1, 2, 3, 4))
        self.codes = nn.Parameter(torch.zeros(4, 5, dtype=torch.int32), requires_grad=False)
        self.norm, self.proj = nn.LayerNorm(5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


class Sensor(nn.Module):
    """A model of layers that are not linear, and of a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.scale = nn.Conv2d(3, 4, 3), nn.LSTM(4, 4), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Any) -> Any:
        return self.lstm(self.conv(x).flatten(2).mT)


class Reads(nn.Module):
    """A module that reads the matrix of another, which never computes."""

    def __init__(self) -> None:
        super().__init__()
        self.silent = nn.Module()
        self.silent.matrix = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.silent.matrix


def with_(layer: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(layer, name, value)
    return layer


def numbers(dtype: torch.dtype) -> nn.Module:
    """A layer with a weight of this dtype."""
    return with_(nn.Linear(4, 4), "weight", nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False))


CANNOT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "old spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), "its weight is computed .*no update can be"),
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm=1"),
    "sparse": (lambda: nn.Embedding(4, 4, sparse=True), "its gradients are sparse"),
    "sparse bag": (lambda: nn.EmbeddingBag(4, 4, sparse=True), "its gradients are sparse"),
    "unsupported type": (lambda: nn.LayerNorm(4), "a LayerNorm is not supported"),
    "integers": (lambda: numbers(torch.int8), "its weight is torch.int8, not floating point"),
    "one byte": (lambda: numbers(torch.float8_e4m3fn), "torch.float8_e4m3fn, with which torch does not compute"),
    "replaced forward": (lambda: with_(nn.Linear(4, 4), "forward", lambda x: x), "its forward is replaced"),
    "replaced method": (lambda: with_(nn.Conv2d(4, 4, 1), "_conv_forward", lambda *x: x), "_conv_forward is replaced"),
    "another library's": (lambda: with_(nn.Linear(4, 4), "lora_A", nn.Parameter(torch.ones(1))), "a lora_A of another"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("build", "why"), CANNOT.values(), ids=CANNOT)
def test_a_layer_that_cannot_be_adapted_is_refused_by_name(build: Any, why: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), build())
    cls, keys = type(model[1]), list(model.state_dict())
    with pytest.raises(TargetError, match=rf"\('1': .*{why}.*Name other layers"):
        adapted(model, target_modules=["1"])
    assert type(model[1]) is cls and is_plain(model) and list(model.state_dict()) == keys
    assert adapted(model, exclude_modules=["1"]) == ("0",)


COMPUTED: dict[str, Callable[[Any], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,  # it holds a layer
    "old weight_norm": nn.utils.weight_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_automatic_targets_leave_out_layers_whose_weight_is_computed(compute: Any) -> None:
    model = net(body=nn.Linear(4, 4), computed=compute(nn.Linear(4, 4)))
    keys = [key for key in model.state_dict() if "computed" in key]
    for targets in ("all-linear", "all"):
        assert adapted(model, target_modules=targets) == ("body",)
    assert [key for key in model.state_dict() if "computed" in key] == keys
    with pytest.raises(TargetError, match=r"'computed': its weight is computed .*prune\), so no update can be merged"):
        adapted(net(computed=model["computed"]))


def test_a_rank_above_what_a_matrix_allows_is_its_largest() -> None:
    model = net(large=nn.Linear(6, 4), small=nn.Linear(6, 3))
    adapted(model, r=1, alpha=8, target_modules=["large", "small"], rank_pattern={".*": 4})
    assert [tuple(model[name].lora_A.shape) for name in ("large", "small")] == [(4, 6), (3, 6)]
    assert [model[name].lora_settings.scaling for name in ("large", "small")] == [2, 2]


# A mistake is named with its nearest names, and with what to write instead


LETTERS = {"a": 1, "b": 2}
MISTAKES: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (LitTiny, {"target_modules": ["q_porj"]}, r"\['q_porj'\] match no module of LitTiny. Nearest names: 'q_proj'"),
    (LitTiny, {"target_modules": ["xyz"]}, r"that can be adapted end in 'embed', 'q_proj', 'v_proj', 'head'"),
    (LitTiny, {"target_modules": "q_pr"}, r"Nearest names: 'q_proj'"),
    (LitTiny, {"exclude_modules": ["haed"]}, r"exclude_modules \['haed'\] .*'head'"),
    (LitTiny, {"modules_to_save": ["classifier"]}, r"modules_to_save \['classifier'\]"),
    (LitTiny, {"rank_pattern": {"k_proj": 2}}, r"rank_pattern \['k_proj'\] .*_proj"),
    (LitTiny, {"target_modules": ["embed"], "exclude_modules": ["embed"]}, "select no layer of LitTiny"),
    (lambda: nn.Sequential(nn.ReLU()), {}, r"Linear, Linear4bit, .*Conv1D, Embedding.*Correct target_modules"),
    # each near name once, and only if it can be adapted
    (
        lambda: nn.ModuleList([net(query=nn.Linear(2, 2)), net(query=nn.Linear(2, 2))]),
        {"target_modules": ["qurey"]},
        r"Nearest names: 'query' \(2 of them, such as '0.query'\)\. Correct",
    ),
    (
        lambda: net(query_norm=nn.LayerNorm(4), query_proj=nn.Linear(4, 4)),
        {"target_modules": ["query_nrom"]},
        r"Nearest names: 'query_proj'\. Correct",
    ),
    # "all" is offered to those who asked for all linear layers, with what it would adapt
    (Sensor, {}, r'would adapt 2 layers: 1 Conv2d \(.conv.\), 1 LSTM \(.lstm.\)\. Set target_modules="all"'),
    (Sensor, {"exclude_modules": ["lstm"]}, r'would adapt 1 layer: 1 Conv2d \(.conv.\)\. Set target_modules="all"'),
    (lambda: net(a=nn.Embedding(4, 4), b=nn.Embedding(4, 4)), {}, r"2 layers: 2 Embedding \(.a. and 1 more\)"),
    (Sensor, {"target_modules": ["conv"], "exclude_modules": ["conv"]}, r'^((?!"all").)*$'),
    # other arguments are named where they are meant
    (lambda: nn.Sequential(Sensor()), {"target_modules": "conv"}, r"is an expression.*list: target_modules=\['conv'\]"),
    (Sensor, {"target_modules": ["scale"]}, r"'scale' is a parameter: name it in target_parameters"),
    (Sensor, {"target_parameters": ["conv"]}, r"match no parameter.*Name parameters, such as 'conv\.weight'"),
    (Sensor, {"target_modules": ["conv"], "rank_pattern": {"lstm": 1}}, r"\['lstm'\] match layers.*not adapted"),
    (Sensor, {"target_modules": ["all_linear"]}, "Or did you mean the word 'all-linear'"),
    (Sensor, {"exclude_modules": ["all_linear"]}, r"^((?!the word).)*$"),
    # another package's class may have the name of a supported one
    (lambda: net(lin=Linear(4, 4)), {"target_modules": ["lin"]}, r"a tests\.\S+\.Linear is not supported, but .*'lin"),
    (lambda: net(lin=Linear(4, 4)), {}, r"other kinds of layers: target_parameters=\['lin\.weight'\]\."),
    # only matrices and layers are offered instead of a module
    (lambda: net(mixed=Table()), {"target_modules": ["mixed"]}, r"are: 'mixed\.proj'\), but .* its 'mixed\.table'\)"),
    (lambda: net(mixed=Table()), {"target_parameters": ["grid"]}, "neither a matrix nor a stack of matrices"),
    (lambda: net(mixed=Table()), {"target_parameters": ["codes"]}, "neither a matrix nor a stack of matrices"),
    (lambda: nn.Sequential(Reads()), {"target_parameters": ["matrix"]}, "no forward of its own, so other code reads"),
    (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {"target_modules": ["out_proj"]},
        r"name 'self_attn', with target_slices={'self_attn': \['out'\]}",
    ),
    # the first key that matches decides
    (
        lambda: net(a=nn.Linear(4, 4), b=nn.Linear(4, 4)),
        {"rank_pattern": {**LETTERS, "[ab]": 3}},
        r"rank_pattern '\[ab\]' has no effect on .*: 'a', 'b' before it match all.*Put it first",
    ),
]


@pytest.mark.parametrize(("build", "config", "message"), MISTAKES)
def test_mistake_is_named_and_changes_nothing(build: Any, config: dict[str, Any], message: str) -> None:
    with unchanged(model := build()), pytest.raises(TargetError, match=message):
        adapted(model, **config)
    assert is_plain(model)


def test_a_key_may_decide_for_the_layers_that_keys_before_it_leave() -> None:
    model = net(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    assert adapted(model, alpha_pattern={**LETTERS, "[abc]": 3}) == ("a", "b", "c")

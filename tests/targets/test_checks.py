"""A selection that cannot be adapted is refused, and a mistake is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lightning_lora import ConfigError, LoRAConfig, TargetError, adapter_state_dict, inject_adapters, remove_adapters
from tests.support.faults import unchanged
from tests.support.layers import Linear
from tests.support.models import LitTiny, is_plain, randomise


def adapted(model: nn.Module, **config: Any) -> tuple[str, ...]:
    return inject_adapters(model, LoRAConfig(**{"r": 1, **config}))


class Table(nn.Module):
    """A matrix that a module reads by itself, with parameters that are none beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.grid = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(1, 2, 3, 4))
        self.codes = nn.Parameter(torch.zeros(4, 5, dtype=torch.int32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


def test_only_unsupported_layers_is_an_error_that_lists_the_supported() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.ReLU())
    for targets in ("all-linear", "all", ["0"], "0|1"):
        with pytest.raises(TargetError, match=r"Linear, Linear4bit, .*Conv1D, Embedding"):
            adapted(model, target_modules=targets)


class Net(nn.Module):
    """A small U-Net: convolutions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 16), (16, 32)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in ((32, 16), (16, 8)))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)


def test_a_model_without_linear_layers_is_told_what_all_would_adapt() -> None:
    with pytest.raises(
        TargetError, match=r'"all" would adapt 6 layers: 4 Conv2d \(.down\.0. and 3 more\), 2 ConvTranspose2d \(.up\.0.'
    ):
        adapted(Net())
    with pytest.raises(TargetError, match=r'"all" would adapt 1 layer: 1 Conv2d \(.head.\)'):
        adapted(Net(), exclude_modules=["up"], modules_to_save=["down"])
    assert len(adapted(Net(), target_modules="all")) == 6


def test_an_entry_of_rank_pattern_above_a_layers_smaller_side_is_refused_by_name() -> None:
    def model() -> nn.Module:
        return nn.ModuleDict({**{f"layer{i}": nn.Linear(6, 3) for i in range(7)}, "body": nn.Linear(16, 16)})

    assert len(adapted(model(), r=16, rank_pattern={"layer[01]": 3})) == 8
    for r in (1, 4, 16):
        with pytest.raises(
            ConfigError, match=r"rank_pattern .* 'layer0' \(r=4, at most 3\), 'layer1' .*\) of ModuleDict"
        ):
            adapted(model(), r=r, rank_pattern={"layer[01]": 4, "body": 2})
    with pytest.raises(ConfigError, match=r"'layer4' \(r=16, at most 3\) and 2 more of ModuleDict"):
        adapted(model(), r=16, rank_pattern={".*": 16})


def test_a_rank_for_several_matrices_may_be_what_the_largest_of_them_allows() -> None:
    def build() -> nn.Module:
        model = nn.ModuleDict({"rnn": nn.LSTM(4, 8), "experts": Table()})
        model["experts"].large = nn.Parameter(torch.randn(9, 8))
        return model

    how: dict[str, Any] = {"target_modules": ["rnn"], "target_parameters": ["table", "large"]}
    assert adapted(build(), **how, rank_pattern={"rnn|experts": 8}) == ("rnn", "experts")
    with pytest.raises(ConfigError, match=r"'rnn' \(r=9, at most 8\), 'experts.table' \(r=9, at most 4\), 'experts.l"):
        adapted(build(), **how, rank_pattern={"rnn|experts": 9})


@pytest.mark.parametrize("argument", ["rank_pattern", "alpha_pattern"])
def test_a_key_whose_layers_are_decided_by_several_before_it_is_refused(argument: str) -> None:
    def build() -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(4, 4) for name in "abc"})

    with pytest.raises(TargetError, match=r"'\[ab\]' has no effect on .*: 'a', 'b' before it match all"):
        adapted(build(), **{argument: {"a": 1, "b": 2, "[ab]": 3}})
    assert adapted(build(), **{argument: {"a": 1, "b": 2, "[abc]": 3}}) == ("a", "b", "c")


def test_a_parameter_that_is_no_matrix_of_numbers_is_refused() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "experts": Table()})
    for name in ("grid", "codes"):
        with pytest.raises(TargetError, match="neither a matrix nor a stack of matrices"):
            adapted(model, target_parameters=[name])


def test_a_weight_of_a_layer_is_updated_by_one_adapter_only() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert adapted(model, target_modules="all-linear", target_parameters=["0.1.weight"]) == ("0", "0.0")
    randomise(model)
    assert {name.rpartition("lora_")[0] for name in adapter_state_dict(model)} == {"0.", "0.0."}


def test_a_layer_of_one_byte_numbers_is_refused_by_its_dtype() -> None:
    built = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    built[1].weight = nn.Parameter(built[1].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TargetError, match=r"'1': its weight is torch.float8_e4m3fn, with which torch does not"):
        inject_adapters(built, LoRAConfig(r=1))
    assert [type(layer) for layer in built] == [nn.Linear, nn.Linear]
    assert inject_adapters(built, LoRAConfig(r=1, exclude_modules=["1"])) == ("0",)
    remove_adapters(built)


def with_(layer: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(layer, name, value)
    return layer


INTEGERS = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
CANNOT: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral_norm": lambda: nn.utils.spectral_norm(nn.Linear(4, 4)),
    "max_norm": lambda: nn.Embedding(4, 4, max_norm=1.0),
    "unsupported type": lambda: nn.LayerNorm(4),
    "integer weight": lambda: with_(nn.Linear(4, 4), "weight", INTEGERS),
    "replaced forward": lambda: with_(nn.Linear(4, 4), "forward", lambda x: x),
    "replaced method": lambda: with_(nn.Conv2d(4, 4, 1), "_conv_forward", lambda *args: args[0]),
    "sparse": lambda: nn.Embedding(4, 4, sparse=True),
    "another library's": lambda: with_(nn.Linear(4, 4), "lora_A", nn.Parameter(torch.zeros(1, 4))),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("build", CANNOT.values(), ids=CANNOT)
def test_layer_that_cannot_be_adapted_is_refused_by_name(build: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), build())
    cls, keys = type(model[1]), list(model.state_dict())
    with pytest.raises(TargetError, match=r"\('1': .*Name other layers"):
        inject_adapters(model, LoRAConfig(r=1, target_modules=["1"]))
    assert type(model[0]) is nn.Linear and type(model[1]) is cls and list(model.state_dict()) == keys


COMPUTED = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_automatic_targets_leave_out_layers_whose_weight_is_computed(compute: Any) -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "computed": compute(nn.Linear(4, 4))})
    keys = [key for key in model.state_dict() if "computed" in key]
    for targets in ("all-linear", "all"):
        assert adapted(model, target_modules=targets) == ("body",)
    assert [key for key in model.state_dict() if "computed" in key] == keys
    with pytest.raises(TargetError, match=r"'computed': its weight is computed .*prune\), so no update can be merged"):
        adapted(nn.ModuleDict({"computed": model["computed"]}))


# A mistake is named with its nearest names, and with what to write instead


class Sensor(nn.Module):
    """A model of layers that are not linear, and of a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm, self.scale = nn.Conv2d(3, 4, 3), nn.LSTM(4, 4), nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Any) -> Any:
        return self.lstm(self.conv(x).flatten(2).mT)


class Mixed(Table):
    def __init__(self) -> None:
        super().__init__()
        self.bias, self.norm, self.proj = nn.Parameter(torch.zeros(5)), nn.LayerNorm(5), nn.Linear(5, 5)


def sensor() -> nn.Module:
    return nn.Sequential(Sensor())


def net(**modules: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.ModuleDict(modules)


QUERIES = nn.ModuleList(nn.ModuleDict({"query": nn.Linear(2, 2)}) for _ in range(2))
BODY, NORMED = net(body=nn.Linear(4, 4)), net(norm=nn.LayerNorm(4), body=nn.Linear(4, 4))
WORDS = net(norm=nn.LayerNorm(4), words=nn.Embedding(4, 4), more=nn.Embedding(4, 4))
MIXED, OWN = net(mixed=Mixed()), net(layers=nn.ModuleDict({"lin": Linear(4, 4)}))
QUERY = net(query_norm=nn.LayerNorm(4), query_proj=nn.Linear(4, 4))
MISTAKES: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (LitTiny, {"target_modules": ["q_porj"]}, r"\['q_porj'\] match no module of LitTiny. Nearest names: 'q_proj'"),
    (LitTiny, {"target_modules": ["xyz"]}, r"that can be adapted end in 'embed', 'q_proj', 'v_proj', 'head'"),
    (LitTiny, {"target_modules": "q_pr"}, r"Nearest names: 'q_proj'"),
    (LitTiny, {"exclude_modules": ["haed"]}, r"exclude_modules \['haed'\] .*'head'"),
    (LitTiny, {"modules_to_save": ["classifier"]}, r"modules_to_save \['classifier'\]"),
    (LitTiny, {"rank_pattern": {"k_proj": 2}}, r"rank_pattern \['k_proj'\] .*_proj"),
    (LitTiny, {"target_modules": ["embed"], "exclude_modules": ["embed"]}, "select no layer of LitTiny"),
    (sensor, {"target_modules": "conv"}, r"is an expression.*give a list: target_modules=\['conv'\]"),
    (sensor, {}, r'would adapt 2 layers: 1 Conv2d \(.0.conv.\), 1 LSTM \(.0.lstm.\)\. Set target_modules="all"'),
    (sensor, {"target_modules": ["scale"]}, r"'0\.scale' is a parameter: name it in target_parameters"),
    (sensor, {"target_parameters": ["conv"]}, r"match no parameter.*Name parameters, such as '0\.conv\.weight'"),
    (sensor, {"target_modules": ["conv"], "rank_pattern": {"lstm": 1}}, r"\['lstm'\] match layers.*not adapted"),
    (
        sensor,
        {"target_modules": ["0"]},
        r"a tests\.\S+\.Sensor is not supported .*'0.conv', '0.lstm'\), but.* '0\.scale'",
    ),
    # each near name once, and only if it can be adapted
    (
        lambda: QUERIES,
        {"target_modules": ["qurey"]},
        r"Nearest names: 'query' \(2 of them, such as '0.query'\)\. Correct",
    ),
    (QUERY, {"target_modules": ["query_nrom"]}, r"Nearest names: 'query_proj'\. Correct"),
    (NORMED, {"target_modules": "no.*"}, "'norm': a LayerNorm is not supported"),
    # "all" is offered to those who asked for all linear layers
    (WORDS, {}, r'2 Embedding \(.words. and 1 more\)\. Set target_modules="all"'),
    (
        WORDS,
        {"target_modules": ["words"], "exclude_modules": ["words"]},
        r"^((?!\"all\").)*Correct target_modules((?!\"all\").)*$",
    ),
    # words mean something in target_modules alone
    (BODY, {"target_modules": ["all_linear"]}, "Or did you mean the word 'all-linear'"),
    (BODY, {"exclude_modules": ["all_linear"]}, r"^((?!the word).)*$"),
    # another package's class may have the name of a supported one
    (OWN, {"target_modules": ["lin"]}, r"a tests\.\S+\.Linear is not supported, but .* its 'layers\.lin\.weight'"),
    (OWN, {}, r"Or adapt matrices of other kinds of layers: target_parameters=\['lin\.weight'\]\."),
    # only matrices and layers are offered instead of a module
    (MIXED, {"target_modules": ["mixed"]}, r"it are: 'mixed\.proj'\), but .* its 'mixed\.table'\)"),
]


@pytest.mark.parametrize(("build", "config", "message"), MISTAKES)
def test_mistake_is_named_and_changes_nothing(
    build: Callable[[], nn.Module], config: dict[str, Any], message: str
) -> None:
    with unchanged(model := build()), pytest.raises(TargetError, match=message):
        adapted(model, **config)
    assert is_plain(model)


def test_projection_inside_an_attention_is_named_by_its_attention() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.raises(TargetError, match=r"name 'self_attn', with target_slices={'self_attn': \['out'\]}"):
        inject_adapters(model, LoRAConfig(r=1, target_modules=["out_proj"]))
    assert inject_adapters(model, LoRAConfig(r=1)) == ("self_attn", "linear1", "linear2")

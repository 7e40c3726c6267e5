"""A selection that cannot be adapted is refused, and a mistake is named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lightning_lora import (
    ConfigError,
    LoRAConfig,
    TargetError,
    inject_adapters,
    register_adapter,
)
from lightning_lora.layers import LoRALayer
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
        self.table = nn.Parameter(torch.randn(4, 5))
        self.codes = nn.Parameter(
            torch.zeros(4, 5, dtype=torch.int32), requires_grad=False
        )
        self.norm = nn.LayerNorm(5)
        self.proj = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table


class Sensor(nn.Module):
    """A model of layers that are not linear, and of a matrix of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.lstm = nn.LSTM(4, 4)
        self.scale = nn.Parameter(torch.ones(2, 2))


def with_(layer: nn.Module, name: str, value: Any) -> nn.Module:
    setattr(layer, name, value)
    return layer


def holding() -> nn.Module:
    return net(silent=with_(nn.Module(), "matrix", nn.Parameter(torch.randn(4, 5))))


def numbers(dtype: torch.dtype) -> nn.Module:
    """A layer with a weight of this dtype."""
    return with_(
        nn.Linear(4, 4),
        "weight",
        nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False),
    )


def heads() -> nn.ModuleList:
    return nn.ModuleList(
        net(query=nn.Linear(2, 2), query_norm=nn.LayerNorm(2)) for _ in range(2)
    )


CANNOT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "max_norm": (lambda: nn.Embedding(4, 4, max_norm=1.0), "max_norm=1"),
    "sparse": (lambda: nn.Embedding(4, 4, sparse=True), "its gradients are sparse"),
    "unsupported type": (lambda: nn.LayerNorm(4), "a LayerNorm is not supported"),
    "integers": (
        lambda: numbers(torch.int8),
        "its weight is torch.int8, not floating point",
    ),
    "one byte": (
        lambda: numbers(torch.float8_e4m3fn),
        "torch.float8_e4m3fn, with which torch does not compute",
    ),
    "replaced forward": (
        lambda: with_(nn.Linear(4, 4), "forward", lambda x: x),
        "its forward is replaced",
    ),
    "replaced method": (
        lambda: with_(nn.Conv2d(4, 4, 1), "_conv_forward", lambda *x: x),
        "_conv_forward is replaced",
    ),
    "nothing": (lambda: nn.Embedding(0, 4), "it has no weights"),
    "another library's": (
        lambda: with_(nn.Linear(4, 4), "lora_A", nn.Parameter(torch.ones(1))),
        "a lora_A of another",
    ),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("build", "why"), CANNOT.values(), ids=CANNOT)
def test_a_layer_that_cannot_be_adapted_is_refused_by_name(
    build: Any, why: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), build())
    with (
        unchanged(model),
        pytest.raises(TargetError, match=rf"\('1': .*{why}.*Name other layers"),
    ):
        adapted(model, target_modules=["1"])
    assert adapted(model, exclude_modules=["1"]) == ("0",)


@pytest.mark.parametrize(
    ("lazy", "name"),
    [(nn.LazyLinear(4), "weight"), (nn.LazyBatchNorm1d(), "running_mean")],
)
def test_what_is_lazy_is_named_and_nothing_is_changed(
    lazy: nn.Module, name: str
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), lazy)
    with pytest.raises(ConfigError, match=rf"'1.{name}'.*lazy.*Run one batch"):
        adapted(model, target_modules=["0"])
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


COMPUTED: dict[str, Callable[[Any], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,  # it holds a layer
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_automatic_targets_leave_out_layers_whose_weight_is_computed(
    compute: Any,
) -> None:
    model = net(body=nn.Linear(4, 4), computed=compute(nn.Linear(4, 4)))
    assert adapted(model, target_modules="all-linear") == ("body",)
    assert adapted(model, target_modules="all") == ("body",)
    with pytest.raises(
        TargetError,
        match=r"'computed': its weight is computed .*prune\), so no update can be merged",
    ):
        adapted(net(computed=model["computed"]))


# A mistake is named with its nearest names, and with what to write instead


LETTERS = {"a": 1, "b": 2}


def letters() -> nn.ModuleDict:
    return net(**{name: nn.Linear(4, 4) for name in "abc"})


def wrapped() -> nn.Module:
    model = net(mixed=Table())
    model.mixed.forward = model.mixed.forward
    return model


MISTAKES: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (
        LitTiny,
        {"target_modules": ["q_porj"]},
        r"\['q_porj'\] match no module of LitTiny. Nearest names: 'q_proj'",
    ),
    (
        LitTiny,
        {"target_modules": ["xyz"]},
        r"that can be adapted end in 'embed', 'q_proj', 'v_proj', 'head'",
    ),
    (LitTiny, {"target_modules": "q_pr"}, r"Nearest names: 'q_proj'"),
    (Sensor, {"modules_to_save": ["scael"]}, r"modules_to_save \['scael'\] .*'scale'"),
    (
        LitTiny,
        {"modules_to_save": ["classifier"]},
        r"If 'head', the last layer, is a new head: modules_to_save=\['head'\]\.",
    ),
    (
        LitTiny,
        {"rank_pattern": {"k_proj": 2}},
        r"rank_pattern \['k_proj'\] .*names: 'v_proj', 'q_proj'\. Correct",
    ),
    (
        LitTiny,
        {"target_modules": ["embed"], "exclude_modules": ["embed"]},
        "both mean .* of LitTiny",
    ),
    (
        lambda: nn.Sequential(nn.ReLU()),
        {},
        r"Linear, Linear4bit, .*Conv1D, Embedding.*Correct target_modules",
    ),
    # each near name once, and only if it can be adapted
    (
        heads,
        {"target_modules": ["qurey"]},
        r"Nearest names: 'query' \(2 of them, such as '0.query'\)\. Correct",
    ),
    # "all" is offered to those who asked for all linear layers, with what it would
    # adapt
    (
        Sensor,
        {"exclude_modules": ["lstm"]},
        r'would adapt 1 layer: 1 Conv2d \(.conv.\)\. Set target_modules="all"',
    ),
    (
        lambda: net(a=nn.Embedding(4, 4), b=nn.Embedding(4, 4)),
        {},
        r"2 layers: 2 Embedding \(.a. and 1 more\)",
    ),
    (
        Sensor,
        {"target_modules": ["conv"], "exclude_modules": ["conv"]},
        r'^((?!"all").)*$',
    ),
    # other arguments are named where they are meant
    (
        lambda: nn.Sequential(Sensor()),
        {"target_modules": "conv"},
        r"is an expression.*list: target_modules=\['conv'\]",
    ),
    (
        Sensor,
        {"target_modules": ["scale"]},
        r"'scale' is a parameter: name it in target_parameters",
    ),
    (
        Sensor,
        {"target_parameters": ["conv"]},
        r"match no parameter.*Name parameters, such as 'conv\.weight'",
    ),
    (
        Sensor,
        {"target_modules": ["conv"], "rank_pattern": {"lstm": 1}},
        r"\['lstm'\] match layers.*not adapted",
    ),
    (
        Sensor,
        {"target_modules": ["all_linear"]},
        "Or did you mean the word 'all-linear'",
    ),
    # another package's class may have the name of a supported one
    (
        lambda: net(lin=Linear(4, 4)),
        {"target_modules": ["lin"]},
        r"a tests\.\S+\.Linear is not supported, but .*'lin",
    ),
    (
        lambda: net(lin=Linear(4, 4)),
        {},
        r"other kinds of layers: target_parameters=\['lin\.weight'\]\.",
    ),
    # only matrices and layers are offered instead of a module
    (
        lambda: net(mixed=Table()),
        {"target_modules": ["mixed"]},
        r"are: 'mixed\.proj'\), but .* its 'mixed\.table'\)",
    ),
    (
        lambda: net(mixed=Table()),
        {"target_parameters": ["codes"]},
        "neither a matrix nor a stack of matrices",
    ),
    (
        holding,
        {"target_parameters": ["matrix"]},
        "no forward of its own, so other code reads",
    ),
    (
        wrapped,
        {"target_parameters": ["mixed.table"]},
        "its forward is replaced on the instance",
    ),
    (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {"target_modules": ["out_proj"]},
        r"name 'self_attn', with target_slices={'self_attn': \['out'\]}",
    ),
    # not every kind of layer has what is asked of it
    (
        lambda: net(e=nn.Embedding(5, 5)),
        {"target_modules": "all", "init": "pissa"},
        r"'pissa' is for .* 'e' \(Emb",
    ),
    (
        lambda: net(up=nn.ConvTranspose2d(4, 6, 3)),
        {"target_modules": ["up"], "target_slices": {"up": {"few": [1, 3]}}},
        "'up' is a ConvTranspose2d, which has no parts for target_slices",
    ),
    # parameters are read by a module around them, and have no parts
    (
        Table,
        {"target_parameters": ["proj.weight"]},
        "Table itself may read it.* name its layer in target_modules",
    ),
    (lambda: net(a=Table()), {"target_parameters": ["proj.bias"]}, r"it is \(5,\)"),
    (
        lambda: net(a=Table()),
        {"target_parameters": ["table"], "rank_pattern": {"codes": 1}},
        "target_parameters too",
    ),
    (
        lambda: net(a=Table()),
        {"target_parameters": ["table"], "target_slices": {"a": ["q"]}},
        "target_slices",
    ),
    # the first key that matches decides
    (
        letters,
        {"rank_pattern": {**LETTERS, "[ab]": 3}},
        r"'\[ab\]' has no effect .*: 'a', 'b' before it.*Put it first",
    ),
]


@pytest.mark.parametrize(("build", "config", "message"), MISTAKES)
def test_mistake_is_named_and_changes_nothing(
    build: Any, config: dict[str, Any], message: str
) -> None:
    model = build()
    with unchanged(model), pytest.raises(TargetError, match=message):
        adapted(model, **config)
    assert is_plain(model)


def test_a_module_whose_parameter_is_adapted_is_no_layer_to_adapt() -> None:
    model = net(a=Table())
    adapted(model, target_modules=[], target_parameters=["table"])
    with pytest.raises(
        TargetError,
        match=r"\('a': only its parameters can be adapted, .* such as 'a\.proj'",
    ):
        adapted(model, target_modules=["a"])


class Alike(nn.Module):
    """A matrix, and a layer whose weight it reads: written with underscores, they have one name."""

    def __init__(self) -> None:
        super().__init__()
        self.read_weight = nn.Parameter(torch.randn(5, 5))
        self.read = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.read_weight @ self.read.weight


def test_matrices_whose_factors_would_have_one_name_are_refused() -> None:
    model = nn.Sequential(Alike())
    with (
        unchanged(model),
        pytest.raises(TargetError, match=r"'read_weight', 'read\.weight'"),
    ):
        adapted(
            model, target_modules=[], target_parameters=["read_weight", "read.weight"]
        )
    adapted(
        nn.Sequential(Alike()), target_modules=[], target_parameters=["read_weight"]
    )
    adapted(
        nn.Sequential(Alike()), target_modules=[], target_parameters=["read.weight"]
    )


class Turned(nn.Module):
    """A linear layer with its weight as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 5))


class LoRATurned(LoRALayer):
    @staticmethod
    def lora_as_matrix(weight: Tensor) -> Tensor:
        return weight.T


def test_a_class_of_ones_own_that_would_merge_another_update_is_refused() -> None:
    register_adapter(Turned, LoRATurned)
    model = net(a=Turned())
    with (
        unchanged(model),
        pytest.raises(TargetError, match=r"LoRATurned, .* would merge a wrong update"),
    ):
        adapted(model, target_modules=["a"])

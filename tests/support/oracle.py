"""What a model with adapters is by plain matrices: a model of five layers, and its oracle."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_lora as ll
from tests.support.models import is_plain, state
from tests.support.parameters import attributes_of_adapters, chosen

WORDS = 5
WIDTH = 3
INDEX = torch.arange(WORDS)
CLASSES = {
    "embed": nn.Embedding,
    "body.conv": Conv1D,
    "body.q": nn.Linear,
    "body.v": nn.Linear,
    "head": nn.Linear,
}
LAYERS = tuple(CLASSES)
TIED = {"embed.weight", "head.weight"}

Tensors = dict[str, Tensor]
Adapters = dict[str, tuple[int, float]]  # layers to rank and scaling


class Model(nn.Module):
    """An embedding, a Conv1D, linear layers with and without a bias, a buffer, and a head that may be tied."""

    mean: Tensor

    def __init__(self, dtype: torch.dtype, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        conv: nn.Module = Conv1D(WIDTH, WIDTH)  # type: ignore[no-untyped-call]
        q = nn.Linear(WIDTH, WIDTH)
        v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.body = nn.ModuleDict({"conv": conv, "q": q, "v": v})
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.head = nn.Linear(WIDTH, WORDS)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, index: Tensor) -> Any:
        x = self.body["conv"](self.embed(index))
        q = self.body["q"](x)
        v = self.body["v"](x)
        return self.head(torch.tanh(q) + v - self.mean)


# What a configuration means on it, by hand

TARGETS: dict[Any, tuple[str, ...]] = {
    "all": LAYERS,
    "all-linear": LAYERS[1:],  # but for a tied head
    ("q", "head"): ("body.q", "head"),
    ("embed", "body.v"): ("embed", "body.v"),
    ("key",): (),
}
SAVED: dict[Any, tuple[str, ...]] = {
    None: (),
    ("head",): ("head",),
    ("embed",): ("embed",),
    ("v",): ("body.v",),
    ("body",): LAYERS[1:4],
}


def left_out(config: ll.LoRAConfig, tied: bool) -> set[str]:
    """The layers that are not adapted, though they are targets."""
    layers = set(SAVED[config.modules_to_save])
    if tied and config.target_modules == "all-linear":
        layers.add("head")
    return layers


def scaling_of(config: ll.LoRAConfig) -> float:
    alpha = config.r if config.alpha is None else config.alpha
    if config.use_rslora:
        return alpha / config.r**0.5
    return alpha / config.r


def meaning(config: ll.LoRAConfig, tied: bool) -> Adapters | type[ll.LoRAError]:
    """What ``config`` adapts, or the error that it is."""
    adapter = (min(config.r, WIDTH), scaling_of(config))
    excluded = left_out(config, tied)
    adapted = {}
    for layer in TARGETS[config.target_modules]:
        if layer not in excluded:
            adapted[layer] = adapter
    return adapted or ll.TargetError


# Tensors by their names


def wide(tensors: dict[str, Any]) -> Tensors:
    """Copies in float64."""
    return {name: value.detach().double().clone() for name, value in tensors.items()}


def without(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def flags_of(model: nn.Module) -> dict[str, bool]:
    """Of each name of a parameter, also of one that is tied, whether it trains."""
    return {
        name: p.requires_grad
        for name, p in model.named_parameters(remove_duplicate=False)
    }


def names_that_train(flags: dict[str, bool]) -> set[str]:
    return {name for name, trains in flags.items() if trains}


def updated(tensors: Tensors, new: Tensors) -> Tensors:
    """The same names, with those values that are new."""
    return {name: new.get(name, value) for name, value in tensors.items()}


def named(layers: Iterable[str], *kinds: str) -> list[str]:
    """The names of such parameters of these layers."""
    return [f"{layer}.{kind}" for layer in layers for kind in kinds]


def factors_of(layers: Iterable[str]) -> list[str]:
    return named(layers, "lora_A", "lora_B")


def assert_close(found: Tensor, exact: Tensor) -> None:
    largest = 1 + exact.abs().max()
    eps = torch.finfo(found.dtype).eps
    assert (found - exact).abs().max() <= 500 * eps * largest


@dataclass
class Oracle:
    """What the model is: float64 tensors by the names of its state dict, and no call of the package."""

    dtype: torch.dtype
    tied: bool  # the base's head is its embedding
    flags: dict[str, bool]  # what the base itself trains
    base: Tensors  # its own parameters and buffer
    now: Tensors  # the same as training left them, without any update
    training: bool = True
    config: ll.LoRAConfig | None = None
    layers: Adapters = field(default_factory=dict)
    factors: Tensors = field(default_factory=dict)  # every lora_A and lora_B
    # the layers that hold W + ΔW, all plain
    merged: set[str] = field(default_factory=set)
    name: str = "default"
    # what rests of other adapters
    others: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    # What it becomes

    def plain(self, base: Tensors) -> "Oracle":
        return Oracle(
            self.dtype, self.is_tied(), self.flags, base, dict(base), self.training
        )

    def rest(self) -> "Oracle":
        """The adapter goes to the others. The base is left."""
        own = chosen(self.now, {*self.trained(), "mean"})
        resting = (self.config, self.layers, self.factors, own)
        others = {**self.others, self.name: resting}
        return replace(
            self, config=None, layers={}, factors={}, now=dict(self.base), others=others
        )

    def show(self, name: str) -> "Oracle":
        """One of the others, instead of this adapter."""
        config, layers, factors, own = self.others[name]
        return replace(
            self,
            name=name,
            config=config,
            layers=layers,
            factors=factors,
            now={**self.base, **own},
            others=without(self.others, [name]),
        )

    def load(self, stored: Tensors) -> None:
        now = {**self.now, "mean": self.base["mean"], **stored}
        self.factors = chosen(now, self.factors)
        self.now = without(now, self.factors)
        self.merge_anew()

    def merge_anew(self) -> None:
        if self.merged:
            self.merged = set(self.layers)

    # What it is

    def is_tied(self) -> bool:
        """Whether the head is the embedding now: a merge unties them."""
        return self.tied and not self.merged & {"embed", "head"}

    def biases(self, config: ll.LoRAConfig) -> list[str]:
        layers = {"none": (), "all": LAYERS, "lora_only": self.layers}[config.bias]
        return named(layers, "bias")

    def trained(self, config: ll.LoRAConfig | None = None) -> set[str]:
        """What trains beside the adapters, by this configuration or another."""
        config = config or self.config
        assert config
        saved = named(SAVED[config.modules_to_save], "weight", "bias")
        names = {*saved, *self.biases(config)} & self.base.keys()
        if self.tied and names & TIED:
            names |= TIED
        return names

    def extends(self, config: ll.LoRAConfig, layers: Adapters) -> bool:
        """Whether these layers by this configuration are the adapter's and perhaps more."""
        assert self.config
        if self.config.dropout != config.dropout or self.trained() != self.trained(
            config
        ):
            return False
        return self.layers.items() <= layers.items()

    def frozen(self) -> Tensors:
        return without(self.base, self.trained())

    def stored(self) -> Tensors:
        """What training changed."""
        names = self.trained()
        if not torch.equal(self.now["mean"], self.base["mean"]):
            names.add("mean")
        return {**self.factors, **chosen(self.now, names)}

    def weight(self, layer: str) -> Tensor:
        """W + s B A, as the layer lays it out."""
        weight = self.now[f"{layer}.weight"]
        if layer not in self.layers:
            return weight
        _, scaling = self.layers[layer]
        a = self.factors[f"{layer}.lora_A"]
        b = self.factors[f"{layer}.lora_B"]
        delta = scaling * b @ a
        if CLASSES[layer] is not nn.Linear:
            delta = delta.T
        return weight + delta

    def output(self) -> Tensor:
        x = self.weight("embed") @ self.weight("body.conv") + self.now["body.conv.bias"]
        q = x @ self.weight("body.q").T + self.now["body.q.bias"]
        v = x @ self.weight("body.v").T
        hidden = torch.tanh(q) + v - self.now["mean"]
        return hidden @ self.weight("head").T + self.now["head.bias"]

    # Whether a model is that

    def check(self, model: nn.Module) -> None:
        """Compare a model with what it is to be."""
        self.check_state(model)
        self.check_output(model)
        adapted = set() if self.merged else set(self.layers)
        self.check_classes(model, adapted)
        self.check_what_trains(model, is_adapted=bool(adapted))
        self.check_ties(model)
        self.check_names(model)
        assert {module.training for module in model.modules()} == {self.training}

    def check_state(self, model: nn.Module) -> None:
        found = state(model)
        expected = self.now if self.merged else {**self.now, **self.factors}
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert value.dtype == self.dtype
            layer = name.removesuffix(".weight")
            if layer in self.merged:
                assert_close(value, self.weight(layer))
            else:
                assert torch.equal(value.double(), expected[name]), name

    def check_output(self, model: nn.Module) -> None:
        if self.training and self.config and self.config.dropout:
            return  # it is random
        assert_close(model(INDEX), self.output())

    def check_classes(self, model: nn.Module, adapted: set[str]) -> None:
        for name, cls in CLASSES.items():
            layer = model.get_submodule(name)
            assert isinstance(layer, cls)
            assert is_plain(layer) is (name not in adapted)
            assert (type(layer) is cls) is (name not in adapted)

    def check_what_trains(self, model: nn.Module, is_adapted: bool) -> None:
        trains = names_that_train(flags_of(model))
        if is_adapted:
            assert trains == {*self.factors, *self.trained()}
        else:
            assert trains == names_that_train(self.flags)

    def check_ties(self, model: nn.Module) -> None:
        embed = model.get_parameter("embed.weight")
        head = model.get_parameter("head.weight")
        assert (embed is head) is self.is_tied()

    def check_names(self, model: nn.Module) -> None:
        active = ll.adapters(model)[:1]
        resting = ll.adapters(model)[1:]
        if self.config:
            assert active == (self.name,)
        else:
            assert active == ()
            assert attributes_of_adapters(model) == []
            assert not model._load_state_dict_pre_hooks
        assert set(resting) == self.others.keys()

"""Any order of calls computes what plain matrices say."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from hypothesis.stateful import run_state_machine_as_test as run
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lightning_lora as ll
from tests.support.compared import assert_state
from tests.support.models import is_plain, same, state

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
        return self.head(torch.tanh(self.body["q"](x)) + self.body["v"](x) - self.mean)


# What a configuration means on it, by hand

TARGETS: dict[Any, tuple[str, ...]] = {
    "all": LAYERS,
    "all-linear": LAYERS[1:],  # but for a tied head
    ("q", "head"): ("body.q", "head"),
    ("embed", "body.v"): ("embed", "body.v"),
    ("key",): (),
}
SAVED: dict[Any, tuple[str, ...]] = {
    None: (), ("head",): ("head",), ("embed",): ("embed",), ("v",): ("body.v",), ("body",): LAYERS[1:4],
}  # fmt: skip
SEEDS = st.integers(0, 99)
BOOLS = st.booleans()
Adapters = dict[str, tuple[int, float]]  # layers to rank and scaling


def meaning(config: ll.LoRAConfig, tied: bool) -> Adapters | type[ll.LoRAError]:
    """What ``config`` adapts, or the error that it is."""
    left_out = {
        *SAVED[config.modules_to_save],
        *(["head"] if tied and config.target_modules == "all-linear" else []),
    }
    layers = [layer for layer in TARGETS[config.target_modules] if layer not in left_out]
    scaling = (config.alpha or config.r) / (config.r**0.5 if config.use_rslora else config.r)
    return dict.fromkeys(layers, (min(config.r, WIDTH), scaling)) if layers else ll.TargetError


ANY = st.builds(
    ll.LoRAConfig,
    r=st.integers(1, WIDTH + 1),
    alpha=st.sampled_from([None, 1, 4.5]),
    dropout=st.sampled_from([0.0, 0.5]),
    target_modules=st.sampled_from(list(TARGETS)),
    modules_to_save=st.sampled_from(list(SAVED)),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    init=st.sampled_from(["kaiming", "gaussian"]),
    use_rslora=BOOLS,
)
VALID = ANY.filter(lambda config: isinstance(meaning(config, True), dict))


@dataclass
class Oracle:
    """What the model is: float64 tensors by the names of its state dict, and no call of the package."""

    dtype: torch.dtype
    tied: bool  # the base's head is its embedding
    flags: dict[str, bool]  # what the base itself trains
    base: dict[str, Tensor]  # its own parameters and buffer
    now: dict[str, Tensor]  # the same as training left them, without any update
    training: bool = True
    config: ll.LoRAConfig | None = None
    layers: Adapters = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)  # every lora_A and lora_B
    merged: set[str] = field(default_factory=set)  # the layers that hold W + ΔW, all plain
    name: str = "default"
    others: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # what rests of other adapters

    def plain(self, base: dict[str, Tensor]) -> "Oracle":
        tied = self.tied and not self.merged & {"embed", "head"}
        return Oracle(self.dtype, tied, self.flags, base, dict(base), self.training)

    def trained(self, config: ll.LoRAConfig | None = None) -> set[str]:
        """What trains beside the adapters, by this configuration or another."""
        config = config or self.config
        assert config
        names = {f"{layer}.{kind}" for layer in SAVED[config.modules_to_save] for kind in ("weight", "bias")}
        names |= {f"{layer}.bias" for layer in {"none": (), "all": LAYERS, "lora_only": self.layers}[config.bias]}
        return names & self.base.keys() | (TIED if self.tied and names & TIED else set())

    def frozen(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.base.items() if name not in self.trained()}

    def stored(self) -> dict[str, Tensor]:
        """What training changed."""
        names = self.trained() | (set() if torch.equal(self.now["mean"], self.base["mean"]) else {"mean"})
        return {**self.factors, **{name: self.now[name] for name in names}}

    def rest(self) -> "Oracle":
        """The adapter goes to the others. The base is left."""
        own = {name: self.now[name] for name in {*self.trained(), "mean"}}
        others = {**self.others, self.name: (self.config, self.layers, self.factors, own)}
        return replace(self, config=None, layers={}, factors={}, now=dict(self.base), others=others)

    def show(self, name: str) -> "Oracle":
        """One of the others, instead of this adapter."""
        config, layers, factors, own = self.others[name]
        others = {each: rests for each, rests in self.others.items() if each != name}
        now = {**self.base, **own}
        return replace(
            self,
            name=name,
            config=config,
            layers=layers,
            factors=factors,
            now=now,
            others=others,
        )

    def load(self, stored: dict[str, Tensor]) -> None:
        now = {**self.now, "mean": self.base["mean"], **stored}
        self.factors = {name: now.pop(name) for name in self.factors}
        self.now = now
        self.merge_anew()

    def merge_anew(self) -> None:
        self.merged = set(self.layers) if self.merged else set()

    def weight(self, layer: str) -> Tensor:
        """W + s B A, as the layer lays it out."""
        weight = self.now[f"{layer}.weight"]
        if layer not in self.layers:
            return weight
        delta = self.layers[layer][1] * self.factors[f"{layer}.lora_B"] @ self.factors[f"{layer}.lora_A"]
        return weight + (delta if CLASSES[layer] is nn.Linear else delta.T)

    def output(self) -> Tensor:
        embed, conv, q, v, head = map(self.weight, LAYERS)
        x = embed @ conv + self.now["body.conv.bias"]
        x = torch.tanh(x @ q.T + self.now["body.q.bias"]) + x @ v.T - self.now["mean"]
        return x @ head.T + self.now["head.bias"]

    def check(self, model: nn.Module) -> None:
        """Compare a model with what it is to be."""
        found = state(model)
        expected = self.now if self.merged else {**self.now, **self.factors}
        assert found.keys() == expected.keys()
        assert {value.dtype for value in found.values()} == {self.dtype}
        for name, value in expected.items():
            layer = name.removesuffix(".weight")
            if layer in self.merged:
                assert_close(found[name], self.weight(layer))
            else:
                assert torch.equal(found[name].double(), value), name
        if not (self.training and self.config and self.config.dropout):
            assert_close(model(INDEX), self.output())

        adapted = set() if self.merged else set(self.layers)
        for name, cls in CLASSES.items():
            layer_now = model.get_submodule(name)
            assert isinstance(layer_now, cls)
            assert is_plain(layer_now) is (name not in adapted)
            assert name in adapted or type(layer_now) is cls
        trains = {*self.factors, *self.trained()} if adapted else {name for name in self.flags if self.flags[name]}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        assert {name for name, p in parameters.items() if p.requires_grad} == trains
        assert len({id(parameters[name]) for name in TIED}) == 2 - (self.tied and not self.merged & {"embed", "head"})
        assert {module.training for module in model.modules()} == {self.training}
        names = ll.adapters(model)
        assert names[:1] == (() if not self.config else (self.name,))
        assert {*names[1:]} == self.others.keys()
        if not self.config:
            assert not [name for module in model.modules() for name in vars(module) if "lora" in name]
            assert not model._load_state_dict_pre_hooks


def assert_close(found: Tensor, exact: Tensor) -> None:
    assert (found - exact).abs().max() <= 500 * torch.finfo(found.dtype).eps * (1 + exact.abs().max())


def wide(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().double().clone() for name, value in values.items()}


CALLS: list[Callable[[nn.Module], Any]] = [
    ll.merge_adapters, ll.unmerge_adapters, ll.adapter_state_dict, lambda m: ll.load_adapter_state_dict(m, {}),
    lambda m: ll.save_adapter(m, "never.safetensors"), lambda m: m.load_state_dict(m.state_dict()),
    lambda m: ll.inject_adapters(m, ll.LoRAConfig(r=1)),
]  # fmt: skip
adapted = precondition(lambda self: self.it.layers)
OTHERS = (ll.AdapterMismatchError, ll.BaseMismatchError)
trainable = precondition(lambda self: self.it.layers and not self.it.merged)
with_files = precondition(lambda self: self.files)


class Orders(RuleBasedStateMachine):
    """One model with its oracle, and what was stored and copied on the way."""

    model: nn.Module
    it: Oracle

    @initialize(
        seed=SEEDS,
        double=BOOLS,
        tied=BOOLS,
        frozen=st.sets(st.sampled_from(LAYERS)),
        config=VALID,
    )
    def build(self, seed: int, double: bool, tied: bool, frozen: set[str], config: ll.LoRAConfig) -> None:
        self.folder = TemporaryDirectory()
        self.files: list[tuple[Path, Oracle]] = []
        self.states: list[dict[str, Tensor]] = []
        self.left: list[tuple[nn.Module, Oracle]] = []  # the models that were copied
        dtype = torch.float64 if double else torch.float32
        self.model = Model(dtype, tied=tied)
        for name, p in self.model.named_parameters():
            if name.removesuffix(".bias") in frozen:  # whole layers would stand still beside the others
                p.requires_grad_(False)
        flags = {name: p.requires_grad for name, p in self.model.named_parameters(remove_duplicate=False)}
        self.it = Oracle(dtype, tied, flags, {}, {})
        self.it = self.it.plain(self.draw(seed, self.model.state_dict()))
        self.model.load_state_dict(self.it.base)
        self.inject(config)

    def teardown(self) -> None:
        self.folder.cleanup()

    @invariant()
    def agrees(self) -> None:
        for model, it in [(self.model, self.it), *self.left[-1:]]:
            it.check(model)

    def draw(self, seed: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
        """Random values, which the model's dtype can hold, for these names and shapes."""
        generator = torch.Generator().manual_seed(seed)
        new = {name: torch.randn(x.shape, generator=generator).div(2).to(self.it.dtype) for name, x in like.items()}
        if self.it.tied and new.keys() >= TIED:
            new["head.weight"] = new["embed.weight"]
        return wide(new)

    def refused(self, call: Callable[[], Any], *errors: type[Exception]) -> None:
        """See that a call fails and changes no bit; the invariant sees the rest."""
        before = state(self.model)
        with pytest.raises(errors):
            call()
        assert_state(self.model, before)

    def settled(self) -> Oracle:
        """What becomes of a merged model for good; its weights have been compared."""
        found = wide(state(self.model))
        return self.it.plain({name: found[name] for name in self.it.base})

    @rule(config=VALID | ANY)
    def inject(self, config: ll.LoRAConfig) -> None:
        inject = partial(ll.inject_adapters, self.model, config, name=self.it.name)
        if self.it.merged and self.it.others:
            return self.refused(inject, ll.AdapterStateError)
        it = self.settled() if self.it.merged else self.it
        layers = meaning(config, it.tied)
        if not isinstance(layers, dict):
            return self.refused(inject, layers)
        extends = it.layers.items() <= layers.items()
        if it.config and (not extends or it.config.dropout != config.dropout or it.trained() != it.trained(config)):
            return self.refused(inject, ll.AdapterMismatchError)
        assert inject() == tuple(layers)
        found = wide(self.model.state_dict())
        for layer in layers.keys() - it.layers.keys():
            a = found[f"{layer}.lora_A"]
            b = found[f"{layer}.lora_B"]
            assert len(a) == b.shape[1] == layers[layer][0]
            assert (bool(a.any()), bool(b.any())) == (layer != "embed", layer == "embed")
        names = [f"{layer}.{factor}" for layer in layers for factor in ("lora_A", "lora_B")]
        factors = {name: it.factors.get(name, found[name]) for name in names}
        self.it = replace(it, name=self.it.name, config=config, layers=layers, factors=factors)
        return None

    @adapted
    @rule(wider=st.sampled_from([{}, {"target_modules": "all"}, {"target_modules": "all-linear"}]))
    def inject_again(self, wider: dict[str, Any]) -> None:
        assert self.it.config
        self.inject(replace(self.it.config, **wider))

    @adapted
    @rule(name=st.sampled_from(["default", "b", "c"]), config=VALID)
    def set_adapter(self, name: str, config: ll.LoRAConfig) -> None:
        """Switch to another adapter, which is new or rests."""
        if name != self.it.name and self.it.merged:
            return self.refused(lambda: ll.set_adapter(self.model, name), ll.AdapterStateError)
        if name in self.it.others:
            ll.set_adapter(self.model, name)
            self.it = self.it.rest().show(name)
        elif name != self.it.name:
            self.it = replace(self.it.rest(), name=name)
            self.inject(config)
        return None

    @precondition(lambda self: self.it.others and not self.it.merged)
    @rule(active=BOOLS)
    def remove_one(self, active: bool) -> None:
        other = next(iter(self.it.others))
        ll.remove_adapters(self.model, self.it.name if active else other)
        if active:
            ll.set_adapter(self.model, other)
            self.it = self.it.show(other)
        else:
            del self.it.others[other]

    @adapted
    @rule()
    def merge(self) -> None:
        ll.merge_adapters(self.model)
        self.it.merged = set(self.it.layers)

    @adapted
    @rule()
    def unmerge(self) -> None:
        ll.unmerge_adapters(self.model)
        self.it.merged = set()

    @adapted
    @rule()
    def remove(self) -> None:
        self.it = self.settled() if self.it.merged else self.it.plain(self.it.base)
        ll.remove_adapters(self.model)

    @adapted
    @rule(call=st.sampled_from(CALLS))
    def disable(self, call: Callable[[nn.Module], Any]) -> None:
        with ll.disable_adapters(self.model), ll.disable_adapters(self.model):
            found = wide(state(self.model))
            assert all(torch.equal(found[name], value) for name, value in self.it.base.items())
            assert_close(self.model(INDEX), self.it.plain(self.it.base).output())
            self.refused(lambda: call(self.model), ll.AdapterStateError)
        self.it.merge_anew()

    @trainable
    @rule(seed=SEEDS, buffers=BOOLS)
    def train(self, seed: int, buffers: bool) -> None:
        it = self.it
        new = self.draw(seed, it.stored() | ({"mean": it.now["mean"]} if buffers else {}))
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(new.get(name, tensor))
        it.now = {name: new.get(name, value) for name, value in it.now.items()}
        it.factors = {name: new[name] for name in it.factors}

    @rule(training=BOOLS)
    def switch(self, training: bool) -> None:
        self.model.train(training)
        self.it.training = training

    @precondition(lambda self: not self.it.merged)
    @rule()
    def widen(self) -> None:
        self.model.double()
        self.it.dtype = torch.float64

    @rule(pickled=BOOLS)
    def copy(self, pickled: bool) -> None:
        self.left.append((self.model, copy.deepcopy(self.it)))
        self.model = pickle.loads(pickle.dumps(self.model)) if pickled else copy.deepcopy(self.model)

    @adapted
    @rule()
    def store(self) -> None:
        stored, expected = ll.adapter_state_dict(self.model), self.it.stored()
        assert stored.keys() == expected.keys()
        assert all(torch.equal(stored[name].double(), value) for name, value in expected.items())
        self.states.append({name: value.detach().clone() for name, value in stored.items()})

    @precondition(lambda self: self.it.layers and self.states)
    @rule(which=SEEDS)
    def load(self, which: int) -> None:
        stored = self.states[which % len(self.states)]
        shapes, needed = ({n: x.shape for n, x in s.items() if n != "mean"} for s in (stored, self.it.stored()))
        if shapes != needed:
            return self.refused(
                lambda: ll.load_adapter_state_dict(self.model, stored),
                ll.AdapterMismatchError,
            )
        ll.load_adapter_state_dict(self.model, stored)
        return self.it.load(wide(stored))

    @adapted
    @rule()
    def save_file(self) -> None:
        path = Path(self.folder.name, f"{len(self.files)}.safetensors")
        ll.save_adapter(self.model, path)
        self.files.append((path, copy.deepcopy(self.it)))

    @with_files
    @rule(which=SEEDS)
    def load_file(self, which: int) -> None:
        path, file = self.files[which % len(self.files)]
        assert file.config
        it = replace(self.it, merged=set())  # its base comes back first
        if not it.config:  # it is adapted as the file says
            layers = meaning(file.config, it.tied)
            assert isinstance(layers, dict)
            it = replace(it, config=file.config, layers=layers)
        same_dtype = it.dtype == file.dtype or (it.dtype, file.dtype) == (
            torch.float64,
            torch.float32,
        )  # converted
        as_file = same_dtype and (it.layers, it.trained()) == (file.layers, file.trained())
        if not as_file or not same(it.frozen(), file.frozen()):
            return self.refused(lambda: ll.load_adapter(self.model, path, name=it.name), *OTHERS)
        ll.load_adapter(self.model, path, name=it.name)
        self.it = replace(it, factors=file.factors)
        return self.it.load(file.stored())

    @with_files
    @rule(which=SEEDS)
    def load_file_onto_a_fresh_base(self, which: int) -> None:
        path, file = self.files[which % len(self.files)]
        model = Model(file.dtype, tied=file.tied)
        model.load_state_dict(file.base)
        ll.load_adapter(model, path)
        replace(file, merged=set(), training=True, name="default", others={}).check(model)

    @precondition(lambda self: not self.it.merged and not self.it.others)
    @rule(seed=SEEDS, what=st.sampled_from(["base", "base with a tied weight once", "all"]))
    def load_other_weights(self, seed: int, what: str) -> None:
        """By torch, into a model around it; with adapters among them, what trains beside these is no base."""
        it = self.it
        new = self.draw(seed, {**it.now, **(it.factors if what == "all" else {})})
        once = {"head.weight"} if it.tied and what == "base with a tied weight once" else set()
        loaded = {f"net.{name}": value for name, value in new.items() if name not in once}
        nn.ModuleDict({"net": self.model}).load_state_dict(loaded, strict=not once)
        theirs = {*it.trained(), "mean"} if it.layers and what == "all" else set()
        it.base = {name: value if name in theirs else new[name] for name, value in it.base.items()}
        it.now = {name: new[name] for name in it.now}
        it.factors = {name: new.get(name, value) for name, value in it.factors.items()}


@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_any_order_of_calls_is_what_plain_matrices_say() -> None:
    run(
        Orders,
        settings=settings(max_examples=150, stateful_step_count=25, derandomize=True),
    )

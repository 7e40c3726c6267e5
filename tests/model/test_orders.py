"""Any order of calls computes what plain matrices say."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
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

import lightning_lora as ll
from tests.support.compared import assert_holds, assert_state
from tests.support.models import same, state
from tests.support.oracle import (
    INDEX,
    LAYERS,
    SAVED,
    TARGETS,
    TIED,
    WIDTH,
    Adapters,
    Model,
    Oracle,
    Tensors,
    assert_close,
    factors_of,
    flags_of,
    meaning,
    updated,
    wide,
    without,
)
from tests.support.parameters import chosen, cloned

SEEDS = st.integers(0, 99)
BOOLS = st.booleans()
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
WIDER = st.sampled_from(
    [{}, {"target_modules": "all"}, {"target_modules": "all-linear"}]
)
CALLS: list[Callable[[nn.Module], Any]] = [
    ll.merge_adapters,
    ll.unmerge_adapters,
    ll.adapter_state_dict,
    lambda model: ll.load_adapter_state_dict(model, {}),
    lambda model: ll.save_adapter(model, "never.safetensors"),
    lambda model: model.load_state_dict(model.state_dict()),
    lambda model: ll.inject_adapters(model, ll.LoRAConfig(r=1)),
]
OTHERS = (ll.AdapterMismatchError, ll.BaseMismatchError)

adapted = precondition(lambda self: self.it.layers)
unmerged = precondition(lambda self: not self.it.merged)
trainable = precondition(lambda self: self.it.layers and not self.it.merged)
among_others = precondition(lambda self: self.it.others and not self.it.merged)
without_others = precondition(lambda self: not self.it.merged and not self.it.others)
with_states = precondition(lambda self: self.it.layers and self.states)
with_files = precondition(lambda self: self.files)


def freeze(model: nn.Module, layers: set[str]) -> None:
    """Freeze the biases of these layers.

    Frozen as a whole, the layers would stand still beside the others.
    """
    for name, p in model.named_parameters():
        if name.removesuffix(".bias") in layers:
            p.requires_grad_(False)


def shapes_of(tensors: Tensors) -> dict[str, torch.Size]:
    """The shapes of all but the buffer, which a file may leave out."""
    return {name: value.shape for name, value in tensors.items() if name != "mean"}


def can_be_read_as(dtype: torch.dtype, stored: torch.dtype) -> bool:
    """Whether a model of this dtype reads the other's files: the same, or a narrower one, converted."""
    return dtype in (stored, torch.float64)


def is_file_of(file: Oracle, it: Oracle) -> bool:
    """Whether the file's adapter is one of this model, on the same base."""
    if not can_be_read_as(it.dtype, file.dtype):
        return False
    if it.layers != file.layers or it.trained() != file.trained():
        return False
    return same(it.frozen(), file.frozen())


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
    def build(
        self,
        seed: int,
        double: bool,
        tied: bool,
        frozen: set[str],
        config: ll.LoRAConfig,
    ) -> None:
        self.folder = TemporaryDirectory()
        self.files: list[tuple[Path, Oracle]] = []
        self.states: list[Tensors] = []
        self.left: list[tuple[nn.Module, Oracle]] = []  # the models that were copied
        dtype = torch.float64 if double else torch.float32
        self.model = Model(dtype, tied=tied)
        freeze(self.model, frozen)
        self.it = Oracle(dtype, tied, flags_of(self.model), {}, {})
        base = self.draw(seed, self.model.state_dict())
        self.it = self.it.plain(base)
        self.model.load_state_dict(base)
        self.inject(config)

    def teardown(self) -> None:
        self.folder.cleanup()

    @invariant()
    def agrees(self) -> None:
        self.it.check(self.model)
        for model, it in self.left[-1:]:
            it.check(model)

    def random(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Random values of this shape, which the model's dtype can hold."""
        values = torch.randn(like.shape, generator=generator) / 2
        return values.to(self.it.dtype)

    def draw(self, seed: int, like: Tensors) -> Tensors:
        """Random values for these names and shapes."""
        generator = torch.Generator().manual_seed(seed)
        new = {name: self.random(value, generator) for name, value in like.items()}
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
        return self.it.plain(chosen(found, self.it.base))

    @rule(config=VALID | ANY)
    def inject(self, config: ll.LoRAConfig) -> None:
        inject = partial(ll.inject_adapters, self.model, config, name=self.it.name)
        if self.it.merged and self.it.others:
            self.refused(inject, ll.AdapterStateError)
            return
        it = self.settled() if self.it.merged else self.it
        layers = meaning(config, it.tied)
        if not isinstance(layers, dict):
            self.refused(inject, layers)
            return
        if it.config and not it.extends(config, layers):
            self.refused(inject, ll.AdapterMismatchError)
            return
        assert inject() == tuple(layers)
        found = wide(self.model.state_dict())
        self.check_fresh(found, layers, layers.keys() - it.layers.keys())
        factors = {**chosen(found, factors_of(layers)), **it.factors}
        self.it = replace(
            it, name=self.it.name, config=config, layers=layers, factors=factors
        )

    def check_fresh(self, found: Tensors, layers: Adapters, fresh: set[str]) -> None:
        """See that new adapters have their rank, and that one of their factors is zero."""
        for layer in fresh:
            rank, _ = layers[layer]
            a = found[f"{layer}.lora_A"]
            b = found[f"{layer}.lora_B"]
            assert len(a) == b.shape[1] == rank
            assert bool(a.any()) is (layer != "embed")
            assert bool(b.any()) is (layer == "embed")

    @adapted
    @rule(wider=WIDER)
    def inject_again(self, wider: dict[str, Any]) -> None:
        assert self.it.config
        self.inject(replace(self.it.config, **wider))

    @adapted
    @rule(name=st.sampled_from(["default", "b", "c"]), config=VALID)
    def set_adapter(self, name: str, config: ll.LoRAConfig) -> None:
        """Switch to another adapter, which is new or rests."""
        if name == self.it.name:
            return
        if self.it.merged:
            self.refused(lambda: ll.set_adapter(self.model, name), ll.AdapterStateError)
        elif name in self.it.others:
            ll.set_adapter(self.model, name)
            self.it = self.it.rest().show(name)
        else:
            self.it = replace(self.it.rest(), name=name)
            self.inject(config)

    @among_others
    @rule(active=BOOLS)
    def remove_one(self, active: bool) -> None:
        other = next(iter(self.it.others))
        if active:
            ll.remove_adapters(self.model, self.it.name)
            ll.set_adapter(self.model, other)
            self.it = self.it.show(other)
        else:
            ll.remove_adapters(self.model, other)
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
        base = self.it.plain(self.it.base)
        with ll.disable_adapters(self.model), ll.disable_adapters(self.model):
            assert_holds(wide(state(self.model)), base.base)
            assert_close(self.model(INDEX), base.output())
            self.refused(lambda: call(self.model), ll.AdapterStateError)
        self.it.merge_anew()

    @trainable
    @rule(seed=SEEDS, buffers=BOOLS)
    def train(self, seed: int, buffers: bool) -> None:
        it = self.it
        changed = it.stored()
        if buffers:
            changed["mean"] = it.now["mean"]
        new = self.draw(seed, changed)
        for name, tensor in self.model.state_dict().items():
            tensor.copy_(new.get(name, tensor))
        it.now = updated(it.now, new)
        it.factors = chosen(new, it.factors)

    @rule(training=BOOLS)
    def switch(self, training: bool) -> None:
        self.model.train(training)
        self.it.training = training

    @unmerged
    @rule()
    def widen(self) -> None:
        self.model.double()
        self.it.dtype = torch.float64

    @rule(pickled=BOOLS)
    def copy(self, pickled: bool) -> None:
        self.left.append((self.model, copy.deepcopy(self.it)))
        if pickled:
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            self.model = copy.deepcopy(self.model)

    @adapted
    @rule()
    def store(self) -> None:
        stored = ll.adapter_state_dict(self.model)
        expected = self.it.stored()
        assert stored.keys() == expected.keys()
        assert_holds(wide(stored), expected)
        self.states.append(cloned(stored))

    @with_states
    @rule(which=SEEDS)
    def load(self, which: int) -> None:
        stored = self.states[which % len(self.states)]
        load = partial(ll.load_adapter_state_dict, self.model, stored)
        if shapes_of(stored) == shapes_of(self.it.stored()):
            load()
            self.it.load(wide(stored))
        else:
            self.refused(load, ll.AdapterMismatchError)

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
        load = partial(ll.load_adapter, self.model, path, name=self.it.name)
        it = replace(self.it, merged=set())  # its base comes back first
        if not it.config:
            it = self.adapted_as(file, it)
        if not is_file_of(file, it):
            self.refused(load, *OTHERS)
            return
        load()
        self.it = replace(it, factors=file.factors)
        self.it.load(file.stored())

    def adapted_as(self, file: Oracle, it: Oracle) -> Oracle:
        """A plain model with the adapters that the file describes."""
        assert file.config
        layers = meaning(file.config, it.tied)
        assert isinstance(layers, dict)
        return replace(it, config=file.config, layers=layers)

    @with_files
    @rule(which=SEEDS)
    def load_file_onto_a_fresh_base(self, which: int) -> None:
        path, file = self.files[which % len(self.files)]
        model = Model(file.dtype, tied=file.tied)
        model.load_state_dict(file.base)
        ll.load_adapter(model, path)
        expected = replace(file, merged=set(), training=True, name="default", others={})
        expected.check(model)

    @without_others
    @rule(seed=SEEDS, once=BOOLS)
    def load_another_base(self, seed: int, once: bool) -> None:
        """By torch, into a model around it, with a tied weight once or twice."""
        it = self.it
        new = self.draw(seed, it.now)
        loaded = without(new, {"head.weight"}) if once and it.tied else new
        self.load_by_torch(loaded)
        it.base = chosen(new, it.base)
        it.now = chosen(new, it.now)

    @without_others
    @rule(seed=SEEDS)
    def load_adapters_with_a_base(self, seed: int) -> None:
        """By torch, with adapters among the weights: what trains beside these is no base."""
        it = self.it
        new = self.draw(seed, {**it.now, **it.factors})
        self.load_by_torch(new)
        theirs = {*it.trained(), "mean"} if it.layers else set()
        it.base = updated(it.base, without(new, theirs))
        it.now = chosen(new, it.now)
        it.factors = chosen(new, it.factors)

    def load_by_torch(self, tensors: Tensors) -> None:
        around = nn.ModuleDict({"net": self.model})
        loaded = {f"net.{name}": value for name, value in tensors.items()}
        is_whole = tensors.keys() >= TIED
        around.load_state_dict(loaded, strict=is_whole)


@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_any_order_of_calls_is_what_plain_matrices_say() -> None:
    run(
        Orders,
        settings=settings(max_examples=150, stateful_step_count=25, derandomize=True),
    )

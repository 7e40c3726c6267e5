"""Several adapters on one base: switching gives exactly what each computes alone, and never touches the base."""

import copy
import itertools
import pickle
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.model.record import find_record
from tests.support.faults import FailsAt
from tests.support.models import same, state

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
HEAD = ll.LoRAConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"])
ONE = ll.LoRAConfig(r=1, target_modules=["2"])


def build() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3)).eval()


def fill(model: nn.Module) -> Tensor:
    """Write random values into what trains, and return the output."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape))
    return model(X.to(next(model.parameters()).dtype)).detach()


def several() -> tuple[nn.Sequential, dict[str | None, Tensor]]:
    """A model with three adapters, "fr" active, and the output of each."""
    model = build()
    outputs: dict[str | None, Tensor] = {None: model(X).detach()}
    for name, config in {"default": HEAD, "de": HEAD, "fr": ONE}.items():
        ll.inject_adapters(model, config, name=name)
        outputs[name] = fill(model)
    return model, outputs


def test_each_adapter_computes_what_it_computed_before_in_any_order() -> None:
    model, outputs = several()
    assert ll.adapters(model) == ("fr", "default", "de")
    for name in ("de", "default", "de", None, "default", "fr", None, "de", "fr", "default", "de", "default"):
        ll.set_adapter(model, name)
        assert torch.equal(model(X), outputs[name]), name


def test_layers_with_other_parameters_are_exchanged_whole() -> None:
    model, outputs = several()
    for name, options in {"dora": {"use_dora": True}, "wide": {"r": 3}, "olora": {"init": "olora"}}.items():
        ll.inject_adapters(model, replace(HEAD, **options), name=name)
        outputs[name] = fill(model)
    for name in [*outputs, *reversed(outputs), *outputs]:
        ll.set_adapter(model, name)
        assert torch.equal(model(X), outputs[name]), name


def test_a_with_block_shows_afterwards_what_was_shown_before() -> None:
    model, outputs = several()
    with ll.set_adapter(model, "de"):
        assert torch.equal(model(X), outputs["de"])
        with suppress(KeyError), ll.set_adapter(model, None):
            assert torch.equal(model(X), outputs[None])
            raise KeyError
        assert torch.equal(model(X), outputs["de"])
    assert torch.equal(model(X), outputs["fr"])


def test_after_a_block_over_the_base_the_same_adapter_is_the_active_one() -> None:
    model, outputs = several()
    ll.set_adapter(model, None)
    for name in ("de", "fr", None):
        with ll.set_adapter(model, name):
            assert torch.equal(model(X), outputs[name])
        assert ll.adapters(model)[0] == "fr" and torch.equal(model(X), outputs[None])
    with ll.set_adapter(model, "de"):
        ll.remove_adapters(model, "fr")
    assert ll.adapters(model)[0] == "de" and torch.equal(model(X), outputs[None])


@pytest.mark.parametrize("shown", ["de", None])
@pytest.mark.parametrize("call", [ll.set_adapter, ll.remove_adapters])
@pytest.mark.parametrize("name", ["de", "default", "fr"])
def test_a_switch_that_fails_anywhere_leaves_the_model_as_it_was(
    call: Callable[..., object], name: str, shown: str | None
) -> None:
    whole, outputs = several()[0], dict[str | None, Tensor]()
    switched(whole, "default", "fr", "de", shown)
    whole.double()  # what was there before has another form
    for each in (*ll.adapters(whole), shown):
        ll.set_adapter(alike := copy.deepcopy(whole), each)
        outputs[each] = alike(X.double())
    for place in itertools.count(1):
        model = copy.deepcopy(whole)
        before, names = state(model), ll.adapters(model)
        try:
            with FailsAt(place) as mode:
                call(model, name)
        except (MemoryError, KeyboardInterrupt):
            assert same(state(model), before) and sorted(ll.adapters(model)) == sorted(names)
            assert torch.equal(model(X.double()), outputs[shown])
            for each in (*names, shown):
                ll.set_adapter(model, each)
                assert torch.equal(model(X.double()), outputs[each])
            continue
        assert mode.left > 0
        break


def test_a_call_without_a_block_stays_and_its_result_shows_it_in_any_number_of_blocks() -> None:
    for merged in (False, True):
        model, outputs = several()
        if merged:
            ll.merge_adapters(model)
        merges, shown = model(X), ll.disable_adapters(model)
        assert torch.equal(model(X), outputs[None]) and repr(shown) == "<Sequential shows its base>"
        for _ in range(2):
            with shown:
                assert torch.equal(model(X), outputs[None])
            assert torch.equal(model(X), merges)
    ll.unmerge_adapters(model)
    de = ll.set_adapter(model, "de")
    assert repr(de) == "<Sequential shows its adapter 'de'>"
    for name in (None, "fr", "de"):
        ll.set_adapter(model, name)
        with de:
            assert torch.equal(model(X), outputs["de"])
        assert torch.equal(model(X), outputs["fr"])


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_name_is_a_string_that_is_not_empty(tmp_path: Path, name: Any) -> None:
    model, plain = several()[0], build()
    ll.save_adapter(model, file := tmp_path / "a.safetensors")
    calls: list[Callable[[], object]] = [lambda: ll.LoRACallback(name=name)]
    for each in (model, plain):
        calls.append(partial(ll.inject_adapters, each, ONE, name=name))
        calls += [partial(ll.load_adapter, each, file, name=name)] if name is not None else []
    for call in calls:
        with pytest.raises(ll.ConfigError, match=f"name={name!r} is not valid"):
            call()
    assert ll.adapters(model) == ("fr", "default", "de") and ll.adapters(plain) == ()
    assert same(state(plain), state(build()))


@pytest.mark.parametrize("name", [3, 1.5, object()])
def test_what_is_no_name_is_no_adapter(name: Any) -> None:
    model, outputs = several()
    for call in (ll.set_adapter, ll.remove_adapters, lambda model, name: ll.adapter_names(model, [name])):
        with pytest.raises(ll.LoRAError, match="has no adapter"):
            call(model, name)
    for names in (3, "de", None, object()):
        with pytest.raises(ll.ConfigError, match="Expected a list"):
            ll.adapter_names(model, names)
    with pytest.raises(ll.AdapterStateError, match=r"no adapter '__base__'.*The base is None"):
        ll.adapter_names(model, ["__base__"])
    assert torch.equal(model(X), outputs["fr"])


def test_another_configuration_names_the_adapter_that_is_in_the_way() -> None:
    model, _ = several()
    with pytest.raises(ll.AdapterMismatchError, match=r"another name=.*remove_adapters\(model, 'de'\)"):
        ll.inject_adapters(model, replace(HEAD, r=3), name="de")
    assert ll.adapters(model)[0] == "fr"


def test_a_mistyped_name_is_an_error_with_near_names() -> None:
    model, outputs = several()
    with pytest.raises(ll.AdapterStateError, match=r"no adapter 'defualt'.*Did you mean 'default'"):
        ll.set_adapter(model, "defualt")
    assert torch.equal(model(X), outputs["fr"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("shown", ["de", None])
def test_a_copy_has_all_adapters_and_switches_by_itself(
    copied: Callable[[nn.Module], nn.Module], shown: str | None
) -> None:
    model, outputs = several()
    ll.set_adapter(model, "de")
    ll.set_adapter(model, shown)
    other = copied(model)
    for name in ("default", "de", "fr"):
        ll.set_adapter(other, name)
        assert torch.equal(other(X), outputs[name])
    assert torch.equal(model(X), outputs[shown])


# What a switch notices, and what it keeps


def switched(model: nn.Module, *names: str | None) -> None:
    for name in names:
        ll.set_adapter(model, name)


def test_an_optimizer_keeps_the_parameters_of_its_own_adapter() -> None:
    model, outputs = several()
    ll.set_adapter(model, "de")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for names in (("default", "de"), ("default", None, "fr", "de")):
        switched(model, *names)
        optimizer.zero_grad()
        model(X).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        assert not torch.equal(model(X), outputs["de"])
        switched(model, "default")
        assert torch.equal(model(X), outputs["default"])


@pytest.mark.parametrize("while_active", ["de", "default", "fr", None])
def test_resting_adapters_follow_the_models_dtype(while_active: str | None) -> None:
    model, outputs = several()
    switched(model, "default", "de", "default", "de", while_active)
    model.double()
    for name in ("de", "default", "fr", "de", "default"):
        ll.set_adapter(model, name)
        assert {p.dtype for p in model.parameters()} == {torch.float64}, name
        torch.testing.assert_close(model(X.double()).float(), outputs[name])
    model.bfloat16()
    for name in ("de", "default"):
        ll.set_adapter(model, name)
        kinds = {name: p.dtype for name, p in model.named_parameters()}
        assert kinds.pop("0.lora_A") == kinds.pop("2.lora_B") == torch.float32
        assert kinds["3.weight"] == kinds["0.weight"] == torch.bfloat16


def test_resting_adapters_follow_a_model_whose_tensors_stay_the_same_objects() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for name in ("de", "fr"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2), name=name)
    switched(model, "de", "fr", "de")
    model.double()
    ll.set_adapter(model, "fr")
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_a_replaced_layer_gets_each_adapter() -> None:
    model, outputs = several()
    switched(model, "default", "de", "default", "de")
    new = build()[0]
    with torch.no_grad():
        new.weight.mul_(2)
    model[0] = new
    with pytest.raises(ll.AdapterStateError, match="no longer have their adapters"):
        ll.set_adapter(model, "default")
    ll.inject_adapters(model, HEAD, name="de")
    ll.set_adapter(model, "default")
    assert model[0] is new and not torch.equal(model(X), outputs["default"])
    expected = outputs["default"]
    with torch.no_grad():
        new.weight.div_(2)
    torch.testing.assert_close(model(X), expected)


def test_other_objects_that_hold_an_adapter_are_exchanged_too() -> None:
    for place in (0, 3):  # adapted, and trained in full
        model, outputs = several()
        switched(model, "default", "de", "default", "de")
        gone, model[place] = model[place], copy.deepcopy(model[place])
        before = state(gone)
        for name in ("default", "de", "default", "de"):
            ll.set_adapter(model, name)
            assert torch.equal(model(X), outputs[name]) and same(state(gone), before), (place, name)


@pytest.mark.parametrize("name", ["0.lora_B", "3.weight", "0.weight"])
def test_new_parameters_are_those_of_the_adapter_that_has_them(name: str) -> None:
    model, outputs = several()
    switched(model, "default", "de", "default", "de")
    layer, leaf = name.split(".")
    new = nn.Parameter(2 * getattr(model.get_submodule(layer), leaf).detach(), requires_grad=name != "0.weight")
    setattr(model.get_submodule(layer), leaf, new)
    now = model(X).detach()
    assert not torch.equal(now, outputs["de"])
    for other in ("default", "fr", "default"):
        ll.set_adapter(model, other)
        assert torch.equal(model(X), outputs[other]) is not (name == "0.weight"), other
        ll.set_adapter(model, "de")
        assert torch.equal(model(X), now) and model.get_parameter(name) is new, other


def test_a_layer_that_is_gone_is_named_before_anything_changes() -> None:
    model, _ = several()
    before = state(model)
    model.append(nn.Linear(3, 3))
    ll.inject_adapters(model, ll.LoRAConfig(r=1, target_modules=["4"]), name="last")
    ll.set_adapter(model, "fr")
    del model[4]
    with pytest.raises(ll.AdapterStateError, match="no longer has '4'"):
        ll.set_adapter(model, "last")
    assert same(state(model), before) and ll.adapters(model)[0] == "fr"


@pytest.mark.parametrize("active", ["de", "fr"])  # which adapts the layer too, and which does not
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_a_layer_that_was_resized_is_named_before_anything_changes(active: str, in_place: bool, shown: bool) -> None:
    model, _ = several()
    switched(model, "default", "de", "default", active)
    layer, wide = model[0], torch.randn(8, 4)
    assert isinstance(layer, nn.Linear)
    if in_place:
        layer.weight.data = wide
    else:
        layer.weight = nn.Parameter(wide, requires_grad=False)
    switched(model, active if shown else None)
    before, about = state(model), repr(model)
    with pytest.raises(ll.AdapterStateError, match=r"'0' of Sequential was resized.*remove_adapters\(model, 'default'"):
        ll.set_adapter(model, "default")
    assert same(state(model), before) and repr(model) == about and ll.adapters(model)[0] == active


def test_norms_that_one_adapter_trains_move_while_it_is_active_alone() -> None:
    model = build()
    ll.inject_adapters(model, CONFIGS["it"], name="it")
    ll.inject_adapters(model, ONE, name="fr")
    for name, moves in (("it", True), ("fr", False), ("it", True), ("fr", False)):
        ll.set_adapter(model, name)
        before = state(model)["1.running_mean"]
        model.train()(X)
        assert torch.equal(state(model)["1.running_mean"], before) is not moves, name


def test_ties_and_recurrent_weights_are_exchanged_whole() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "rnn": nn.GRU(4, 4), "q": nn.Linear(4, 4)})
    model["head"] = nn.Linear(4, 5, bias=False)
    model["head"].weight = model["embed"].weight

    def run() -> Tensor:
        return model["head"](model["q"](model["rnn"](model["embed"](torch.arange(5)))[0])).detach()

    outputs = {None: run()}
    for name in ("a", "b"):
        config = ll.LoRAConfig(r=2, target_modules=["q"], modules_to_save=["embed", "rnn"])
        ll.inject_adapters(model, config, name=name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * parameter.requires_grad)
        outputs[name] = run()
    for name in ("a", "b", None, "a", "b", "a"):
        ll.set_adapter(model, name)
        assert torch.equal(run(), outputs[name]) and model["head"].weight is model["embed"].weight
    ll.inject_adapters(model, ll.LoRAConfig(r=1, target_modules=["q"]), name="c")
    assert torch.equal(run(), outputs[None]) and model["head"].weight is model["embed"].weight


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_compiled_once_for_each_adapter() -> None:
    model, outputs = several()
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend)
    for names, count in ((("default", "de"), 1), (("fr", None), 3), (("de", "fr", None, "default", "fr", "de"), 3)):
        for name in names:
            ll.set_adapter(model, name)
            torch.testing.assert_close(run(X), outputs[name])
        assert len(compiled) == count


# Files


def test_a_file_loads_beside_the_active_adapter_and_into_a_resting_one(tmp_path: Path) -> None:
    model, outputs = several()
    for name in ("de", "fr"):
        ll.set_adapter(model, name)
        ll.save_adapter(model, tmp_path / f"{name}.safetensors")
    alone = build()
    ll.load_adapter(alone, tmp_path / "de.safetensors")
    assert ll.adapters(alone) == ("default",) and torch.equal(alone(X), outputs["de"])
    ll.load_adapter(alone, tmp_path / "fr.safetensors", name="fr")
    ll.set_adapter(model, "de")
    fill(model)
    ll.set_adapter(model, "default")
    ll.load_adapter(model, tmp_path / "de.safetensors", name="de")
    for each, active, names in ((alone, "default", ("default", "fr")), (model, "default", ("default", "de", "fr"))):
        assert sorted(ll.adapters(each)) == sorted(names) and ll.adapters(each)[0] == active
    assert torch.equal(alone(X), outputs["de"]) and torch.equal(model(X), outputs["default"])
    switched(alone, "fr")
    switched(model, "de")
    assert torch.equal(alone(X), outputs["fr"]) and torch.equal(model(X), outputs["de"])


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("name", ["new", "fr"])
def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path, name: str, merged: bool) -> None:
    model, outputs = several()
    ll.set_adapter(model, "de")
    other = build()
    ll.inject_adapters(other, HEAD)
    with torch.no_grad():
        other[2].bias.add_(1)  # another base
    ll.save_adapter(other, tmp_path / "other.safetensors")
    if merged:
        ll.merge_adapters(model)
    before, names = state(model), ll.adapters(model)
    with pytest.raises(ll.LoRAError):
        ll.load_adapter(model, tmp_path / "other.safetensors", name=name)
    assert same(state(model), before) and sorted(ll.adapters(model)) == sorted(names)
    ll.unmerge_adapters(model)
    for each in ("de", "fr", "default"):
        ll.set_adapter(model, each)
        assert torch.equal(model(X), outputs[each])


@pytest.mark.parametrize("merged", [True, False])
def test_nothing_is_loaded_while_the_base_is_shown(merged: bool) -> None:
    model, outputs = several()
    ll.set_adapter(model, "de")
    held = state(model)
    fill(model)
    if merged:
        ll.merge_adapters(model)
    before = state(model)
    with ll.disable_adapters(model), pytest.raises(ll.AdapterStateError, match=r"shows its base now.*'de'"):
        model.load_state_dict(held, strict=False)
    assert same(state(model), before)
    ll.unmerge_adapters(model)
    model.load_state_dict(held)
    assert torch.equal(model(X), outputs["de"])


def test_another_base_is_the_base_of_all_adapters() -> None:
    model, _ = several()
    alone = {name: copy.deepcopy(model) for name in ("default", "de", "fr")}
    torch.manual_seed(9)
    base = {name: torch.randn(value.shape).abs() for name, value in state(build()).items() if value.is_floating_point()}
    for name, each in alone.items():
        switched(each, name)
        for other in alone.keys() - {name}:
            ll.remove_adapters(each, other)
    switched(model, "default", "de", "fr")
    for each in (model, *alone.values()):
        with pytest.warns(ll.LoRAWarning):
            each.load_state_dict(base, strict=False)
    switched(model, None)
    assert all(torch.equal(state(model)[name], value) for name, value in base.items())
    for name in ("fr", "default", None):
        switched(model, name)
        if name == "fr":
            assert torch.equal(model(X), alone[name](X))
    assert all(torch.equal(state(model)[name], value) for name, value in base.items())
    ll.remove_adapters(model)
    assert all(torch.equal(state(model)[name], value) for name, value in base.items())


def test_another_base_is_that_of_an_adapter_that_was_active_before() -> None:
    model = build()
    ll.inject_adapters(model, HEAD, name="de")
    ll.inject_adapters(model, replace(HEAD, modules_to_save=None), name="fr")
    switched(model, "de", "fr", "de")
    base = {name: torch.randn(value.shape) for name, value in state(build()).items() if name.endswith("weight")}
    model.load_state_dict(base, strict=False)
    for name in ("fr", "de", "fr"):
        ll.set_adapter(model, name)
    assert all(torch.equal(state(model)[name], value) for name, value in base.items())


def test_a_frozen_weight_that_was_loaded_is_that_of_its_adapter_alone() -> None:
    model = build()
    for name in ("de", "fr"):
        ll.inject_adapters(model, HEAD, name=name)
    switched(model, "de", "fr", "de")
    record, values = find_record(model), {"de": torch.ones(4), "fr": state(model)["0.bias"]}
    assert record is not None
    record.adapter.set_untrained(["0.bias"])  # it looks untrained, so files hold it
    ll.load_adapter_state_dict(model, {**ll.adapter_state_dict(model), "0.bias": values["de"]})
    for name in ("fr", "de", "fr"):
        ll.set_adapter(model, name)
        assert torch.equal(state(model)["0.bias"], values[name])


def test_modules_inside_with_several_adapters_are_refused() -> None:
    inner, _ = several()
    with pytest.raises(ll.AdapterStateError, match="have several adapters"):
        ll.inject_adapters(nn.Sequential(inner), ll.LoRAConfig(r=1, target_modules=["0.2"]))


# Any order of calls, against plain matrices

CONFIGS = {
    "default": HEAD,
    "de": ll.LoRAConfig(r=2, alpha=3, target_modules=["0", "2"], modules_to_save=["3"]),
    "fr": ONE,
    "it": ll.LoRAConfig(r=1, target_modules=["0", "2"], modules_to_save=["1"], bias="all"),
    "nl": ll.LoRAConfig(r=2, target_modules=["0"], init="pissa", bias="lora_only"),
}
HEADS = {"3.weight", "3.bias"}
NORM = {"1.weight", "1.bias", "1.running_mean"}
OWN = {"default": HEADS, "de": HEADS, "fr": set(), "it": NORM | {"0.bias", "2.bias", "3.bias"}, "nl": {"0.bias"}}


class Orders:
    """A model, and for each adapter the state of the plain model that computes the same. None: that of the base."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder, self.model = random.Random(seed), folder, build()
        self.known: dict[str | None, dict[str, Tensor]] = {None: state(self.model)}
        self.files: dict[str, dict[str, Tensor]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.shown: str | None = None
        self.merged = False

    def names(self) -> list[str]:
        return [name for name in self.known if name]

    def check(self) -> None:
        """The outputs, the base's bits, the names, and what trains are those of the plain model."""
        expected, now = self.known[self.shown], state(self.model)
        plain = build().to(now["0.weight"].dtype)
        plain.load_state_dict(expected)
        x = X.to(now["0.weight"].dtype)
        torch.testing.assert_close(self.model(x), plain(x), rtol=1e-4, atol=1e-4)
        own = OWN[self.shown] if self.shown else set[str]()
        for name, value in self.known[self.shown if self.merged else None].items():
            assert name in own or self.merged or torch.equal(now[name], value), name
        assert sorted(ll.adapters(self.model)) == sorted(self.names())
        assert self.shown is None or ll.adapters(self.model)[0] == self.shown
        trains = {name for name, p in self.model.named_parameters() if p.requires_grad and "lora" not in name}
        record = find_record(self.model)
        assert record is None or record.is_merged or trains == own - {"1.running_mean"}

    def refused(self, call: Callable[[], object]) -> None:
        with pytest.raises(ll.LoRAError):
            call()

    def train(self) -> None:
        """Give what trains other values, and compute by hand what they are."""
        if self.shown is None or self.merged:
            return
        fill(self.model)
        if self.shown == "it":
            self.model[1].running_mean.copy_(torch.randn(4))  # type: ignore[operator]
        config, held = CONFIGS[self.shown], state(self.model)
        plain = {name: held[name] for name in self.known[None]}
        for layer in config.target_modules:
            update = held[f"{layer}.lora_B"] @ held[f"{layer}.lora_A"]
            if config.init == "pissa":
                update = update - held[f"{layer}.lora_B0"] @ held[f"{layer}.lora_A0"]
            plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + (config.alpha or config.r) / config.r * update
        self.known[self.shown] = plain

    def inject(self) -> None:
        name = self.random.choice(list(CONFIGS))
        if self.merged and len(self.names()) == 1:
            return  # it would be a new base
        if self.merged or (self.names() and self.shown is None):
            self.refused(lambda: ll.inject_adapters(self.model, CONFIGS[name], name=name))
            return
        ll.inject_adapters(self.model, CONFIGS[name], name=name)
        self.shown = name
        if name not in self.known:
            self.train()

    def set(self) -> None:
        name = self.random.choice([None, *CONFIGS])
        possible = self.names() and name in self.known and (not self.merged or name in (None, self.shown))
        if possible and not self.merged:
            ll.set_adapter(self.model, name)
            self.shown = name
        elif possible:
            with ll.set_adapter(self.model, name):
                pass
        else:
            self.refused(lambda: ll.set_adapter(self.model, name))

    def block(self) -> None:
        before, possible = self.shown, [name for name in self.known if not self.merged or name in (None, self.shown)]
        if not self.names():
            return
        self.shown, merged = self.random.choice(possible), self.merged
        with ll.set_adapter(self.model, self.shown):
            self.merged = merged and self.shown is not None
            self.check()
        self.shown, self.merged = before, merged

    def remove(self) -> None:
        name = self.random.choice(list(CONFIGS))
        is_active = name in ll.adapters(self.model)[:1]
        if name not in self.known or (is_active and self.merged):
            if name not in self.known or len(self.names()) > 1:
                self.refused(lambda: ll.remove_adapters(self.model, name))
            return
        ll.remove_adapters(self.model, name)
        del self.known[name]
        self.shown = None if is_active else self.shown

    def merge(self) -> None:
        if self.shown is not None:
            ll.merge_adapters(self.model)
            self.merged = True

    def unmerge(self) -> None:
        if self.shown is not None:
            ll.unmerge_adapters(self.model)
            self.merged = False

    def save(self) -> None:
        if self.shown is not None:
            ll.save_adapter(self.model, self.folder / f"{self.shown}.safetensors")
            self.files[self.shown] = self.known[self.shown]
            self.dtypes[self.shown] = state(self.model)["0.weight"].dtype

    def load(self) -> None:
        if not self.files:
            return
        name = self.random.choice(list(self.files))
        call = partial(ll.load_adapter, self.model, self.folder / f"{name}.safetensors", name=name)
        is_narrow = (state(self.model)["0.weight"].dtype, self.dtypes[name]) == (torch.float32, torch.float64)
        if is_narrow or (self.names() and self.shown is None):
            self.refused(call)
            return
        call()
        self.known[name] = self.files[name]
        if len(self.names()) == 1:
            self.shown = name
        self.merged = self.merged and name != self.shown

    def copy(self) -> None:
        self.model = self.random.choice([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])(self.model)

    def convert(self) -> None:
        """All values are those of float32, also in float64."""
        if not self.merged:
            self.model.to(self.random.choice([torch.float32, torch.float64]))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
def test_any_order_of_calls_gives_each_adapter_its_own_output(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    orders = Orders(seed, tmp_path)
    calls = [getattr(orders, name) for name in vars(Orders) if name not in ("__init__", "names", "check", "refused")]
    calls = [call for call in calls if callable(call)] + [orders.inject, orders.set, orders.set]
    for _ in range(30):
        orders.random.choice(calls)()
        orders.check()
    if orders.merged:
        orders.unmerge()
    for name in orders.names():
        ll.set_adapter(orders.model, name)
        orders.shown = name
        orders.check()

"""Several adapters on one base: switching gives exactly what each computes alone, and never touches the base."""

import copy
import itertools
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from tests.support.compared import assert_state
from tests.support.faults import FailsAt, unchanged
from tests.support.models import state

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


def test_layers_with_other_parameters_are_exchanged_whole() -> None:
    model, outputs = several()
    for name, options in {
        "dora": {"use_dora": True},
        "wide": {"r": 3},
        "olora": {"init": "olora"},
    }.items():
        ll.inject_adapters(model, replace(HEAD, **options), name=name)
        outputs[name] = fill(model)
    for name in [*outputs, *reversed(outputs), *outputs]:
        ll.set_adapter(model, name)
        assert torch.equal(model(X), outputs[name]), name


@pytest.mark.parametrize(
    ("call", "name", "shown"),
    [
        (ll.set_adapter, "default", "de"),
        (ll.set_adapter, "default", None),
        (ll.remove_adapters, "de", "de"),
        (ll.remove_adapters, "de", None),
    ],
)
def test_a_switch_that_fails_anywhere_leaves_the_model_as_it_was(call: Any, name: str, shown: str | None) -> None:
    whole = several()[0]
    outputs = dict[str | None, Tensor]()
    switched(whole, "default", "fr", "de", shown)
    whole.double()  # what was there before has another form
    for each in (*ll.adapters(whole), shown):
        alike = copy.deepcopy(whole)
        ll.set_adapter(alike, each)
        outputs[each] = alike(X.double())
    for place in itertools.count(1):
        model = copy.deepcopy(whole)
        before = state(model)
        names = ll.adapters(model)
        try:
            with FailsAt(place) as mode:
                call(model, name)
        except (MemoryError, KeyboardInterrupt):
            assert_state(model, before)
            assert sorted(ll.adapters(model)) == sorted(names)
            assert torch.equal(model(X.double()), outputs[shown])
            for each in (*names, shown):
                ll.set_adapter(model, each)
                assert torch.equal(model(X.double()), outputs[each])
            continue
        assert mode.left > 0
        break


def test_a_switch_that_is_refused_still_shows_the_base() -> None:
    model, outputs = several()
    switched(model, "de", None)
    lost = model[2]
    model[2] = nn.Linear(4, 4)
    with pytest.raises(ll.AdapterStateError, match="'2' of Sequential no longer have their adapters"):
        ll.set_adapter(model, "fr")
    model[2] = lost
    assert torch.equal(model(X), outputs[None])


@pytest.mark.parametrize("merged", [False, True])
def test_a_call_without_a_block_stays_and_its_result_shows_it_in_any_number_of_blocks(merged: bool) -> None:
    model, outputs = several()
    if merged:
        ll.merge_adapters(model)
    before = model(X)
    shown = ll.disable_adapters(model)
    assert torch.equal(model(X), outputs[None])
    assert repr(shown) == "<Sequential shows its base>"
    for _ in range(2):
        with suppress(KeyError), shown:
            assert torch.equal(model(X), outputs[None])
            raise KeyError
        assert torch.equal(model(X), before)
    ll.unmerge_adapters(model)
    de = ll.set_adapter(model, "de")
    assert repr(de) == "<Sequential shows its adapter 'de'>"
    for name in (None, "fr", "de"):
        ll.set_adapter(model, name)
        with de:
            assert torch.equal(model(X), outputs["de"])
        assert torch.equal(model(X), outputs["fr"])
    ll.set_adapter(model, None)
    with ll.set_adapter(model, "de"):
        assert torch.equal(model(X), outputs["de"])
        ll.remove_adapters(model, "fr")  # what it showed before
    assert ll.adapters(model)[0] == "de"
    assert torch.equal(model(X), outputs[None])


@pytest.mark.parametrize("name", ["", 3])
def test_a_name_is_a_string_that_is_not_empty(tmp_path: Path, name: Any) -> None:
    ll.save_adapter(several()[0], file := tmp_path / "a.safetensors")
    for call in (
        ll.LoRACallback,
        partial(ll.inject_adapters, build(), ONE),
        partial(ll.load_adapter, build(), file),
    ):
        with pytest.raises(ll.ConfigError, match=f"name={name!r} is not valid"):
            call(name=name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (object(), "has no adapter <object"),
        ("defualt", r"no adapter 'defualt'.*Did you mean 'default'"),
        ("__base__", r"no adapter '__base__'.*The base is None"),
    ],
)
def test_a_name_that_no_adapter_has_is_an_error(name: Any, message: str) -> None:
    model, outputs = several()
    for call in (
        ll.set_adapter,
        ll.remove_adapters,
        lambda model, name: ll.adapter_names(model, [name]),
    ):
        with pytest.raises(ll.AdapterStateError, match=message):
            call(model, name)
    assert torch.equal(model(X), outputs["fr"])


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


def test_norms_that_one_adapter_trains_move_while_it_is_active_alone() -> None:
    model = build()
    ll.inject_adapters(
        model,
        ll.LoRAConfig(r=1, target_modules=["0", "2"], modules_to_save=["1"]),
        name="it",
    )
    ll.inject_adapters(model, ONE, name="fr")
    for name, moves in (("it", True), ("fr", False), ("it", True), ("fr", False)):
        ll.set_adapter(model, name)
        before = state(model)["1.running_mean"]
        model.train()(X)
        assert torch.equal(state(model)["1.running_mean"], before) is not moves, name


def test_recurrent_weights_are_exchanged_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4))
    outputs = dict[str | None, Tensor]()
    for name in ("a", "b"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["1"]), name=name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * parameter.requires_grad)
        outputs[name] = model(X)[0]
    for name in ("a", "b", "a"):
        ll.set_adapter(model, name)
        assert torch.equal(model(X)[0], outputs[name])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_compiled_once_for_each_adapter() -> None:
    model, outputs = several()
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend)
    for names, count in (
        (("default", "de"), 1),
        (("fr", None), 3),
        (("de", "fr", None, "default", "fr", "de"), 3),
    ):
        for name in names:
            ll.set_adapter(model, name)
            torch.testing.assert_close(run(X), outputs[name])
        assert len(compiled) == count


# Files


@pytest.mark.parametrize(("name", "merged"), [("new", True), ("new", False), ("fr", False)])
def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path, name: str, merged: bool) -> None:
    (model, outputs), other = several(), build()
    ll.set_adapter(model, "de")
    ll.inject_adapters(other, HEAD)
    nn.init.ones_(other[2].bias)  # another base
    ll.save_adapter(other, tmp_path / "other.safetensors")
    if merged:
        ll.merge_adapters(model)
    names = ll.adapters(model)
    with unchanged(model), pytest.raises(ll.LoRAError):
        ll.load_adapter(model, tmp_path / "other.safetensors", name=name)
    assert sorted(ll.adapters(model)) == sorted(names)
    ll.unmerge_adapters(model)
    for each in ("de", "fr", "default"):
        ll.set_adapter(model, each)
        assert torch.equal(model(X), outputs[each])


def test_a_layer_that_is_gone_is_named_before_anything_changes() -> None:
    model, _ = several()
    before = state(model)
    model.append(nn.Linear(3, 3))
    ll.inject_adapters(model, ll.LoRAConfig(r=1, target_modules=["4"]), name="last")
    ll.set_adapter(model, "fr")
    model[4] = nn.Identity()
    for call in (
        partial(ll.set_adapter, model, "last"),
        ll.adapter_names(model, ["last"]).__enter__,
    ):
        with pytest.raises(
            ll.AdapterStateError,
            match=r"no longer has '4\.weight'.*remove_adapters\(model, 'last'\)",
        ):
            call()
    assert_state(model, before)
    assert ll.adapters(model)[0] == "fr"
    ll.remove_adapters(model, "last")


def test_a_saved_module_that_is_gone_is_named_before_anything_changes() -> None:
    model, _ = several()
    del model[3]
    with pytest.raises(ll.AdapterStateError, match=r"no longer has .*'3\.weight'"):
        ll.set_adapter(model, "de")
    assert ll.adapters(model)[0] == "fr"


@pytest.mark.parametrize("shown", ["fr", None])
def test_a_layer_that_was_resized_is_named_before_anything_changes(shown: str | None) -> None:
    model, _ = several()
    model[0].weight = nn.Parameter(torch.randn(8, 4), requires_grad=False)
    ll.set_adapter(model, shown)
    before = state(model)
    about = repr(model)
    with pytest.raises(
        ll.AdapterStateError,
        match=r"'0' of Sequential were resized.*remove_adapters\(model, 'de'\)",
    ):
        ll.set_adapter(model, "de")
    assert_state(model, before)
    assert repr(model) == about
    assert ll.adapters(model)[0] == "fr"


@pytest.mark.filterwarnings("ignore:A state of the base was loaded:lightning_lora.LoRAWarning")
def test_another_base_is_the_base_of_all_adapters() -> None:
    model, _ = several()
    alone = copy.deepcopy(model)
    for other in ("default", "de"):
        ll.remove_adapters(alone, other)
    switched(model, "default", "de", "fr")
    base = {name: torch.randn(value.shape).abs() for name, value in state(build()).items() if value.is_floating_point()}
    for each in (model, alone):
        each.load_state_dict(base, strict=False)
    for name in (None, "fr", "default", "de", None):
        ll.set_adapter(model, name)
        assert name != "fr" or torch.equal(model(X), alone(X))
        assert name or all(torch.equal(state(model)[each], value) for each, value in base.items())
    ll.remove_adapters(model)
    assert all(torch.equal(state(model)[name], value) for name, value in base.items())


def test_modules_inside_with_several_adapters_are_refused() -> None:
    inner, _ = several()
    with pytest.raises(ll.AdapterStateError, match="have several adapters"):
        ll.inject_adapters(nn.Sequential(inner), ll.LoRAConfig(r=1, target_modules=["0.2"]))

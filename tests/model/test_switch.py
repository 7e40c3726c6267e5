"""Several adapters on one base: switching gives exactly what each computes alone, and never touches the base."""

import copy
import itertools
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.model.changes.off_layers import move_to
from lightning_lora.model.switch import activate
from tests.support.compared import assert_holds, assert_state
from tests.support.faults import fails_at, unchanged
from tests.support.models import state
from tests.support.parameters import grads_of, trainable

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
HEAD = ll.LoRAConfig(r=2, target_modules=["0", "2"], modules_to_save=["3"])
ONE = ll.LoRAConfig(r=1, target_modules=["2"])


def build() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3)
    ).eval()


def fill(model: nn.Module) -> Tensor:
    """Write random values into what trains, and return the output."""
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.copy_(torch.randn(parameter.shape))
    dtype = next(model.parameters()).dtype
    return model(X.to(dtype)).detach()


Outputs = dict[str | None, Tensor]


def several() -> tuple[nn.Sequential, Outputs]:
    """A model with three adapters, "fr" active, and the output of each."""
    model = build()
    outputs: Outputs = {None: model(X).detach()}
    for name, config in {"default": HEAD, "de": HEAD, "fr": ONE}.items():
        ll.inject_adapters(model, config, name=name)
        outputs[name] = fill(model)
    return model, outputs


def switched(model: nn.Module, *names: str | None) -> None:
    for name in names:
        ll.set_adapter(model, name)


def assert_outputs(
    model: nn.Module, outputs: Outputs, names: Iterable[str | None], x: Tensor = X
) -> None:
    """Switch to each of these in turn, and expect its output."""
    for name in names:
        ll.set_adapter(model, name)
        assert torch.equal(model(x), outputs[name]), name


def test_layers_with_other_parameters_are_exchanged_whole() -> None:
    model, outputs = several()
    others = {
        "dora": replace(HEAD, use_dora=True),
        "wide": replace(HEAD, r=3),
        "olora": replace(HEAD, init="olora"),
    }
    for name, config in others.items():
        ll.inject_adapters(model, config, name=name)
        outputs[name] = fill(model)
    assert_outputs(model, outputs, [*outputs, *reversed(outputs), *outputs])


def outputs_of_copies(
    model: nn.Module, names: Iterable[str | None], x: Tensor
) -> Outputs:
    """What a copy computes with each of these."""
    outputs: Outputs = {}
    for name in names:
        alike = copy.deepcopy(model)
        ll.set_adapter(alike, name)
        outputs[name] = alike(x)
    return outputs


@pytest.mark.parametrize(
    ("call", "name", "shown"),
    [
        (ll.set_adapter, "default", "de"),
        (ll.set_adapter, "default", None),
        (ll.remove_adapters, "de", "de"),
        (ll.remove_adapters, "de", None),
    ],
)
def test_a_switch_that_fails_anywhere_leaves_the_model_as_it_was(
    call: Any, name: str, shown: str | None
) -> None:
    whole, _ = several()
    switched(whole, "default", "fr", "de", shown)
    whole.double()  # what was there before has another form
    x = X.double()
    names = ll.adapters(whole)
    before = state(whole)
    outputs = outputs_of_copies(whole, [*names, shown], x)
    for place in itertools.count(1):
        model = copy.deepcopy(whole)
        if not fails_at(place, partial(call, model, name)):
            break
        assert_state(model, before)
        assert sorted(ll.adapters(model)) == sorted(names)
        assert torch.equal(model(x), outputs[shown])
        assert_outputs(model, outputs, [*names, shown], x)


def test_a_switch_that_is_refused_still_shows_the_base() -> None:
    model, outputs = several()
    switched(model, "de", None)
    lost = model[2]
    model[2] = nn.Linear(4, 4)
    with pytest.raises(
        ll.AdapterStateError, match="'2' of Sequential no longer have their adapters"
    ):
        ll.set_adapter(model, "fr")
    model[2] = lost
    assert torch.equal(model(X), outputs[None])


@pytest.mark.parametrize("merged", [False, True])
def test_a_call_without_a_block_stays_and_its_result_shows_it_in_any_number_of_blocks(
    merged: bool,
) -> None:
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


def test_after_a_block_the_base_is_shown_again_over_the_adapter_that_was_active() -> (
    None
):
    model, outputs = several()
    ll.set_adapter(model, None)
    with ll.set_adapter(model, "de"):
        assert torch.equal(model(X), outputs["de"])
    assert torch.equal(model(X), outputs[None])
    assert ll.adapters(model)[0] == "fr"  # which a file or a merge takes


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of an adapter "fr"."""
    model, _ = several()
    ll.save_adapter(model, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", ["", 3])
def test_a_name_is_a_string_that_is_not_empty(file: Path, name: Any) -> None:
    message = f"name={name!r} is not valid"
    with pytest.raises(ll.ConfigError, match=message):
        ll.LoRACallback(name=name)
    with pytest.raises(ll.ConfigError, match=message):
        ll.inject_adapters(build(), ONE, name=name)
    with pytest.raises(ll.ConfigError, match=message):
        ll.load_adapter(build(), file, name=name)


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
    with pytest.raises(ll.AdapterStateError, match=message):
        ll.set_adapter(model, name)
    with pytest.raises(ll.AdapterStateError, match=message):
        ll.remove_adapters(model, name)
    with pytest.raises(ll.AdapterStateError, match=message):
        ll.adapter_names(model, [name])
    assert torch.equal(model(X), outputs["fr"])


# What a switch notices, and what it keeps


def test_an_optimizer_keeps_the_parameters_of_its_own_adapter() -> None:
    model, outputs = several()
    ll.set_adapter(model, "de")
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for names in (["default", "de"], ["default", None, "fr", "de"]):
        switched(model, *names)
        optimizer.zero_grad()
        model(X).square().sum().backward()
        assert None not in grads_of(trainable(model))
        optimizer.step()
        assert not torch.equal(model(X), outputs["de"])
        switched(model, "default")
        assert torch.equal(model(X), outputs["default"])


def moves_in_training(model: nn.Sequential) -> bool:
    """Whether a forward in training mode moves the statistics of the norm."""
    before = state(model)["1.running_mean"]
    model.train()(X)
    return not torch.equal(state(model)["1.running_mean"], before)


def test_norms_that_one_adapter_trains_move_while_it_is_active_alone() -> None:
    model = build()
    norm = ll.LoRAConfig(r=1, target_modules=["0", "2"], modules_to_save=["1"])
    ll.inject_adapters(model, norm, name="it")
    ll.inject_adapters(model, ONE, name="fr")
    for _ in range(2):
        ll.set_adapter(model, "it")
        assert moves_in_training(model)
        ll.set_adapter(model, "fr")
        assert not moves_in_training(model)


class LastOfGRU(nn.Sequential):
    """A linear layer, and a GRU without its state."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.GRU(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def test_recurrent_weights_are_exchanged_whole() -> None:
    model = LastOfGRU()
    outputs: Outputs = {}
    for name in ("a", "b"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["1"]), name=name)
        outputs[name] = fill(model)
    assert_outputs(model, outputs, ["a", "b", "a"])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_is_compiled_once_for_each_adapter() -> None:
    model, outputs = several()
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(1)
        return graph.forward

    def run_with(*names: str | None) -> None:
        for name in names:
            ll.set_adapter(model, name)
            torch.testing.assert_close(run(X), outputs[name])

    torch._dynamo.reset()
    run = torch.compile(model, backend=backend)
    run_with("default", "de")
    assert len(compiled) == 1
    run_with("fr", None)
    assert len(compiled) == 3
    run_with("de", "fr", None, "default", "fr", "de")
    assert len(compiled) == 3


# Files


@pytest.mark.parametrize(
    ("name", "merged"), [("new", True), ("new", False), ("fr", False)]
)
def test_a_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, name: str, merged: bool
) -> None:
    model, outputs = several()
    other = build()
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
    assert_outputs(model, outputs, ["de", "fr", "default"])


def test_a_layer_that_is_gone_is_named_before_anything_changes() -> None:
    model, _ = several()
    before = state(model)
    model.append(nn.Linear(3, 3))
    ll.inject_adapters(model, ll.LoRAConfig(r=1, target_modules=["4"]), name="last")
    ll.set_adapter(model, "fr")
    model[4] = nn.Identity()
    message = r"no longer has '4\.weight'.*remove_adapters\(model, 'last'\)"
    with pytest.raises(ll.AdapterStateError, match=message):
        ll.set_adapter(model, "last")
    with pytest.raises(ll.AdapterStateError, match=message):
        ll.adapter_names(model, ["last"]).__enter__()
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
def test_a_layer_that_was_resized_is_named_before_anything_changes(
    shown: str | None,
) -> None:
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


@pytest.mark.filterwarnings(
    "ignore:A state of the base was loaded:lightning_lora.LoRAWarning"
)
def test_another_base_is_the_base_of_all_adapters() -> None:
    model, _ = several()
    alone = copy.deepcopy(model)
    ll.remove_adapters(alone, "default")
    ll.remove_adapters(alone, "de")
    switched(model, "default", "de", "fr")
    base = another_base()
    model.load_state_dict(base, strict=False)
    alone.load_state_dict(base, strict=False)
    switched(model, None)
    assert_holds(state(model), base)
    switched(model, "fr")
    assert torch.equal(model(X), alone(X))
    switched(model, "default", "de", None)
    assert_holds(state(model), base)
    ll.remove_adapters(model)
    assert_holds(state(model), base)


def test_modules_inside_with_several_adapters_are_refused() -> None:
    inner, _ = several()
    with pytest.raises(ll.AdapterStateError, match="have several adapters"):
        ll.inject_adapters(
            nn.Sequential(inner), ll.LoRAConfig(r=1, target_modules=["0.2"])
        )


def another_base() -> dict[str, Tensor]:
    """Random values of a base, but for the counter of its norm."""
    values = {}
    for name, value in state(build()).items():
        if value.is_floating_point():
            values[name] = torch.randn(value.shape).abs()
    return values


def test_a_tensor_that_is_moved_off_its_model_keeps_its_gradient() -> None:
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 3.0)
    move_to(p, p.device, torch.float64)
    assert torch.equal(p.grad, torch.full((2,), 3.0, dtype=torch.float64))


def test_what_was_trained_beside_the_updates_gets_no_gradient_while_the_base_is_shown() -> (
    None
):
    model, _ = several()
    switched(model, "de", None)
    assert not model[3].weight.requires_grad
    switched(model, "de")
    assert model[3].weight.requires_grad


def test_an_unknown_adapter_without_a_configuration_is_refused() -> None:
    model, _ = several()
    with unchanged(model), pytest.raises(ll.AdapterStateError, match="'no'"):
        activate(model, "no")

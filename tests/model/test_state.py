"""A model and its parts remember their own base, and read its tensors once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import lightning_lora as ll
from lightning_lora.model.view import View
from lightning_lora.tensors import names
from tests.support.compared import (
    assert_all_refused,
    assert_holds,
    assert_same_tensors,
    assert_state,
)
from tests.support.models import (
    Around,
    LitTiny,
    TinyLM,
    as_merged,
    as_trained,
    best,
    data,
    flags,
    lora,
    randomise,
    state,
    trainer,
)


def test_a_part_of_the_module_that_was_trained_is_told_what_to_pass(
    tmp_path: Path,
) -> None:
    net = TinyLM()
    as_merged(Around(net))  # as scvi's plans train a network that their users hold
    calls: list[Callable[[nn.Module], object]] = [
        ll.merge_adapters,
        ll.remove_adapters,
        lambda part: ll.disable_adapters(part),
        lambda part: ll.save_adapter(part, tmp_path / "a.safetensors"),
        lambda part: ll.save_merged(part, tmp_path / "a.ckpt"),
        lambda part: ll.export_peft(part, tmp_path / "peft"),
    ]
    assert_all_refused(
        net, calls, ll.AdapterStateError, "TinyLM has no adapters. .* pass that model"
    )
    assert_all_refused(
        net.q_proj,
        calls,
        ll.AdapterStateError,
        "Linear has no adapters. .* pass that model",
    )


def sharing_layers() -> tuple[LitTiny, LitTiny]:
    """Two modules, all of whose layers but their heads are the same."""
    one = LitTiny()
    two = LitTiny()
    two.embed = one.embed
    two.q_proj = one.q_proj
    two.v_proj = one.v_proj
    return one, two


def test_two_modules_that_share_layers_do_not_take_them_from_each_other(
    tmp_path: Path,
) -> None:
    one, two = sharing_layers()
    t = trainer(tmp_path, [lora(), best(tmp_path)], max_epochs=1)
    t.fit(one, data(), data())
    as_trained(two)
    before = state(two)
    calls: list[Callable[[LitTiny], object]] = [
        lambda one: t.test(one, data(), ckpt_path="best", verbose=False),
        lambda one: t.validate(one, data(), verbose=False),
        ll.unmerge_adapters,
    ]
    message = "'q_proj', 'v_proj' of LitTiny have the adapters of another"
    assert_all_refused(one, calls, ll.AdapterStateError, message)
    assert_state(two, before)
    ll.remove_adapters(two)
    t.test(one, data(), ckpt_path="best", verbose=False)


def test_a_merged_module_inside_another_is_a_base_as_it_is() -> None:
    outer = nn.Sequential(as_merged(LitTiny()), nn.Linear(4, 4))
    before = state(outer)
    ll.inject_adapters(outer, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    with ll.disable_adapters(outer):
        assert_holds(state(outer), before)
    ll.remove_adapters(outer)
    assert_state(outer, before)


def part_and_whole() -> tuple[nn.Sequential, nn.Sequential, ll.LoRAConfig]:
    """A part that was adapted by itself and trained, its biases from zero to one; and the model that holds it."""
    part = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = ll.LoRAConfig(r=2, bias="all")
    part[1].bias.requires_grad_(False)
    nn.init.zeros_(part[0].bias)
    ll.inject_adapters(part, config)
    randomise(part)
    nn.init.ones_(part[0].bias)
    return part, nn.Sequential(nn.Linear(4, 4), part), config


def test_the_values_and_flags_of_a_part_that_was_trained_first_are_given_back_by_the_whole() -> (
    None
):
    part, model, config = part_and_whole()
    ll.load_adapter_state_dict(part, ll.adapter_state_dict(part))
    ll.inject_adapters(model, config)
    assert View(model).adapter.may_have_learned
    with pytest.raises(ll.AdapterStateError):  # it is no longer the part's to give back
        ll.remove_adapters(part)
    assert (part[0].bias == 1).all()
    with ll.disable_adapters(model):
        assert (part[0].bias == 0).all()
    ll.remove_adapters(model)
    assert (part[0].bias == 0).all()
    assert {name for name, trains in flags(model).items() if not trains} == {"1.1.bias"}


class Drifting(LitTiny):
    """A module whose own code changes a weight that is frozen."""

    def on_train_batch_end(self, *_: Any) -> None:
        nn.init.ones_(self.embed.weight)


def test_a_frozen_weight_of_a_part_that_its_fit_changed_is_stored_with_the_whole(
    tmp_path: Path,
) -> None:
    part = Drifting()
    callback = ll.LoRACallback(r=2, target_modules=["q_proj"], merge=False)
    trainer(tmp_path, [callback], max_epochs=1).fit(part, data())
    assert "embed.weight" in ll.adapter_state_dict(part)
    model = nn.Sequential(part)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["q_proj"]))
    assert (ll.adapter_state_dict(model)["0.embed.weight"] == 1).all()


def test_part_and_whole_remember_what_is_theirs_when_adapting_the_whole_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    part, model, config = part_and_whole()
    values = ll.adapter_state_dict(part)
    before = flags(model)
    monkeypatch.setattr("lightning_lora.model.inject.freeze", None)
    with pytest.raises(TypeError):
        ll.inject_adapters(model, config)
    assert_same_tensors(ll.adapter_state_dict(part), values)
    assert flags(model) == before
    with pytest.raises(ll.AdapterStateError):
        ll.adapter_state_dict(model)
    ll.remove_adapters(part)
    assert (part[0].bias == 0).all()


# A call walks over a model few times


class Pair(nn.Module):
    """Two layers that are adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)


class Walks:
    """Counts the walks over all modules of a model: ours, torch's, and state dicts."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model = model
        self.number = 0
        for holder, name in (
            (names, "_walk"),
            (nn.Module, "named_modules"),
            (nn.Module, "state_dict"),
        ):
            monkeypatch.setattr(holder, name, self.counted(getattr(holder, name)))

    def counted(self, walk: Callable[..., Any]) -> Callable[..., Any]:
        def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if module is self.model:
                self.number += 1
            return walk(module, *args, **kwargs)

        return counting

    def during(self, call: Callable[[], object]) -> int:
        self.number = 0
        call()
        return self.number


def many_layers(number: int) -> nn.Sequential:
    """Pairs of layers, a norm, and a head."""
    pairs = [Pair() for _ in range(number)]
    head = nn.ModuleDict({"head": nn.Linear(4, 2)})
    return nn.Sequential(*pairs, nn.BatchNorm1d(4), head)


def walks(number: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The walks of each call over such a model."""
    model = many_layers(number)
    config = ll.LoRAConfig(r=2, modules_to_save=["head"])
    calls: dict[str, Callable[[], Any]] = {
        "inject": lambda: ll.inject_adapters(model, config),
        "load_adapter_state_dict": lambda: ll.load_adapter_state_dict(
            model, ll.adapter_state_dict(model)
        ),
        "save_adapter": lambda: ll.save_adapter(model, file),
        "load_adapter": lambda: ll.load_adapter(model, file),
        "disable": lambda: ll.disable_adapters(model).__exit__(None, None, None),
        "merge": lambda: ll.merge_adapters(model),
        "summarize": lambda: ll.summarize(model),
        "unmerge": lambda: ll.unmerge_adapters(model),
        "remove": lambda: ll.remove_adapters(model),
    }
    with monkeypatch.context() as patch:
        count = Walks(model, patch)
        return {name: count.during(call) for name, call in calls.items()}


def test_walks_over_a_model_do_not_grow_with_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = walks(2, tmp_path / "2.safetensors", monkeypatch)
    many = walks(24, tmp_path / "24.safetensors", monkeypatch)
    assert few == many
    assert max(few.values()) <= 16
    assert few["inject"] <= 5
    assert few["save_adapter"] <= 4
    assert few["merge"] <= 4

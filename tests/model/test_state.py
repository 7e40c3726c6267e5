"""A model and its parts remember their own base, and read its tensors once."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.model.view import View
from lightning_lora.tensors import names
from tests.support.compared import assert_same_tensors, assert_state
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


def test_a_part_of_the_module_that_was_trained_is_told_what_to_pass(tmp_path: Path) -> None:
    net = TinyLM()
    as_merged(Around(net))  # as scvi's plans train a network that their users hold
    calls: list[Callable[[nn.Module], object]] = [
        ll.merge_adapters, ll.remove_adapters, lambda part: ll.disable_adapters(part),
        lambda part: ll.save_adapter(part, tmp_path / "a.safetensors"),
        lambda part: ll.save_merged(part, tmp_path / "a.ckpt"), lambda part: ll.export_peft(part, tmp_path / "peft"),
    ]  # fmt: skip
    for call in calls:
        for part, title in ((net, "TinyLM"), (net.q_proj, "Linear")):
            with pytest.raises(ll.AdapterStateError, match=rf"{title} has no adapters. .* pass that model"):
                call(part)


def test_two_modules_that_share_layers_do_not_take_them_from_each_other(tmp_path: Path) -> None:
    one = LitTiny()
    two = LitTiny()
    two.embed = one.embed
    two.q_proj = one.q_proj
    two.v_proj = one.v_proj
    t = trainer(tmp_path, [lora(), best(tmp_path)], max_epochs=1)
    t.fit(one, data(), data())
    as_trained(two)
    before = state(two)
    for call in (
        lambda: t.test(one, data(), ckpt_path="best", verbose=False),
        lambda: t.validate(one, data(), verbose=False),
        lambda: ll.unmerge_adapters(one),
    ):
        with pytest.raises(
            ll.AdapterStateError,
            match="'q_proj', 'v_proj' of LitTiny have the adapters of another",
        ):
            call()
    assert_state(two, before)
    ll.remove_adapters(two)
    t.test(one, data(), ckpt_path="best", verbose=False)


def test_a_merged_module_inside_another_is_a_base_as_it_is() -> None:
    outer = nn.Sequential(as_merged(LitTiny()), nn.Linear(4, 4))
    before = state(outer)
    ll.inject_adapters(outer, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    with ll.disable_adapters(outer):
        assert all(torch.equal(value, before[name]) for name, value in state(outer).items() if name in before)
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


def test_the_values_and_flags_of_a_part_that_was_trained_first_are_given_back_by_the_whole() -> None:
    part, model, config = part_and_whole()
    ll.load_adapter_state_dict(part, ll.adapter_state_dict(part))
    ll.inject_adapters(model, config)
    assert View(model).adapter.is_trained
    with pytest.raises(ll.AdapterStateError):  # it is no longer the part's to give back
        ll.remove_adapters(part)
    assert (part[0].bias == 1).all()
    with ll.disable_adapters(model):
        assert (part[0].bias == 0).all()
    ll.remove_adapters(model)
    assert (part[0].bias == 0).all()
    assert {name for name, trains in flags(model).items() if not trains} == {"1.1.bias"}


def test_a_frozen_weight_of_a_part_that_its_fit_changed_is_stored_with_the_whole(tmp_path: Path) -> None:
    class Drifting(LitTiny):
        def on_train_batch_end(self, *_: Any) -> None:
            nn.init.ones_(self.embed.weight)

    part = Drifting()
    model = nn.Sequential()
    trainer(
        tmp_path,
        [ll.LoRACallback(r=2, target_modules=["q_proj"], merge=False)],
        max_epochs=1,
    ).fit(part, data())
    assert "embed.weight" in ll.adapter_state_dict(part)
    model.append(part)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["q_proj"]))
    assert (ll.adapter_state_dict(model)["0.embed.weight"] == 1).all()


def test_part_and_whole_remember_what_is_theirs_when_adapting_the_whole_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    part, model, config = part_and_whole()
    values = ll.adapter_state_dict(part)
    before = flags(model)
    monkeypatch.setattr("lightning_lora.model.attach.freeze", None)
    with pytest.raises(TypeError):
        ll.inject_adapters(model, config)
    assert_same_tensors(ll.adapter_state_dict(part), values)
    assert flags(model) == before
    with pytest.raises(ll.AdapterStateError):
        ll.adapter_state_dict(model)
    ll.remove_adapters(part)
    assert (part[0].bias == 0).all()


# A call walks over a model few times


def walks(number: int, file: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The walks of each call over all modules of a model: ours, torch's, and state dicts."""
    pairs = [nn.ModuleDict({name: nn.Linear(4, 4) for name in "qk"}) for _ in range(number)]
    model = nn.Sequential(*pairs, nn.BatchNorm1d(4), nn.ModuleDict({"head": nn.Linear(4, 2)}))
    config = ll.LoRAConfig(r=2, modules_to_save=["head"])
    count = Counter[str]()
    calls: dict[str, Callable[[], Any]] = {
        "inject": lambda: ll.inject_adapters(model, config),
        "load_adapter_state_dict": lambda: ll.load_adapter_state_dict(model, ll.adapter_state_dict(model)),
        "save_adapter": lambda: ll.save_adapter(model, file),
        "load_adapter": lambda: ll.load_adapter(model, file),
        "disable": lambda: ll.disable_adapters(model).__exit__(None, None, None),
        "merge": lambda: ll.merge_adapters(model),
        "summarize": lambda: ll.summarize(model),
        "unmerge": lambda: ll.unmerge_adapters(model),
        "remove": lambda: ll.remove_adapters(model),
    }

    def counted(walk: Callable[..., Any]) -> Callable[..., Any]:
        def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            count["now"] += module is model
            return walk(module, *args, **kwargs)

        return counting

    with monkeypatch.context() as patch:
        for holder, name in (
            (names, "_walk"),
            (nn.Module, "named_modules"),
            (nn.Module, "state_dict"),
        ):
            patch.setattr(holder, name, counted(getattr(holder, name)))
        for name, call in calls.items():
            count["now"] = 0
            call()
            count[name] = count["now"]
    return dict(count)


def test_walks_over_a_model_do_not_grow_with_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (walks(number, tmp_path / f"{number}.safetensors", monkeypatch) for number in (2, 24))
    assert few == many
    assert max(few.values()) <= 16
    assert few["inject"] <= 5
    assert few["save_adapter"] <= 4
    assert few["merge"] <= 4

"""A model and its parts remember their own base, and read its tensors once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.layers import LoRALayer
from lightning_lora.model.record import AdapterState, Record, find_record
from lightning_lora.tensors import names
from lightning_lora.tensors.digests import digest
from tests.support.models import LitTiny, best, data, flags, lora, randomise, same, state, trainer, unfreezable


def test_adapters_injected_in_a_part_belong_to_the_whole_afterwards() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)})
    config = ll.LoRAConfig(r=2)
    ll.inject_adapters(model["body"], config)
    ll.inject_adapters(model, config)
    ll.inject_adapters(model["body"], config)
    ll.inject_adapters(model, config)
    with pytest.raises(ll.AdapterMismatchError, match="modules_to_save"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, bias="all"))
    ll.remove_adapters(model)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(isinstance(module, LoRALayer) for module in model.modules())


class Plan(L.LightningModule):
    """Trains a network that its users hold, as scvi's plans do."""

    def __init__(self, module: LitTiny) -> None:
        super().__init__()
        self.module = module

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.module.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


CALLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "save_adapter": lambda part, folder: ll.save_adapter(part, folder / "a.safetensors"),
    "unmerge_adapters": lambda part, _: ll.unmerge_adapters(part),
    "merge_adapters": lambda part, _: ll.merge_adapters(part),
    "remove_adapters": lambda part, _: ll.remove_adapters(part),
    "disable_adapters": lambda part, _: ll.disable_adapters(part),
    "adapter_state_dict": lambda part, _: ll.adapter_state_dict(part),
    "save_merged": lambda part, folder: ll.save_merged(part, folder / "a.ckpt"),
    "export_peft": lambda part, folder: ll.export_peft(part, folder / "peft"),
}


@pytest.mark.parametrize("merge", ["last", False])
@pytest.mark.parametrize("call", CALLS)
def test_a_part_of_the_module_that_was_trained_is_told_what_to_pass(tmp_path: Path, merge: Any, call: str) -> None:
    net = LitTiny()
    t = trainer(tmp_path, [lora(modules_to_save=None, merge=merge)], max_epochs=1, enable_checkpointing=False)
    t.fit(Plan(net), data())
    for part, title in ((net, "LitTiny"), (net.q_proj, "Linear")):
        with pytest.raises(ll.AdapterStateError, match=rf"{title} has no adapters. .* pass that model \(after a fit:"):
            CALLS[call](part, tmp_path)
    CALLS[call](t.lightning_module, tmp_path)


def test_a_whole_with_a_part_that_is_trained_is_trained() -> None:
    model, config = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)}), ll.LoRAConfig(r=2)
    ll.inject_adapters(model["body"], config)
    ll.load_adapter_state_dict(model["body"], ll.adapter_state_dict(model["body"]))
    ll.inject_adapters(model, config)
    record = find_record(model)
    assert record is not None and record.adapter.is_trained


def test_two_modules_that_share_layers_do_not_take_them_from_each_other(tmp_path: Path) -> None:
    one, two = LitTiny(), LitTiny()
    two.embed, two.q_proj, two.v_proj = one.embed, one.q_proj, one.v_proj
    t = trainer(tmp_path, [lora(), best(tmp_path)])
    t.fit(one, data(), data())
    trainer(tmp_path, [lora(merge=False)]).fit(two, data())
    before = state(two)
    with pytest.raises(ll.AdapterStateError, match=r"'q_proj', 'v_proj' of LitTiny have the adapters of another model"):
        t.test(one, data(), ckpt_path="best", verbose=False)
    for call in (ll.unmerge_adapters, lambda model: t.validate(model, data(), verbose=False)):
        with pytest.raises(ll.AdapterStateError, match="have the adapters of another model"):
            call(one)
    assert same(state(two), before)
    ll.remove_adapters(two)
    t.test(one, data(), ckpt_path="best", verbose=False)


def test_a_merged_module_inside_another_is_a_base_as_it_is(tmp_path: Path) -> None:
    inner, outer = LitTiny(), LitTiny()
    trainer(tmp_path, [lora()]).fit(inner, data())
    outer.inner = inner
    before = state(outer)
    ll.inject_adapters(outer, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    with ll.disable_adapters(outer):
        assert all(torch.equal(value, before[name]) for name, value in state(outer).items() if name in before)
    ll.remove_adapters(outer)
    assert same(state(outer), before)


def part_and_whole() -> tuple[nn.Sequential, nn.Sequential, ll.LoRAConfig]:
    """A part that was adapted by itself and trained, its biases from zero to one; and the model that holds it."""
    part, config = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), ll.LoRAConfig(r=2, bias="all")
    part[1].bias.requires_grad_(False)
    nn.init.zeros_(part[0].bias)
    ll.inject_adapters(part, config)
    randomise(part)
    nn.init.ones_(part[0].bias)
    return part, nn.Sequential(nn.Linear(4, 4), part), config


def test_the_values_and_flags_of_a_part_that_was_trained_first_are_given_back_by_the_whole() -> None:
    part, model, config = part_and_whole()
    ll.inject_adapters(model, config)
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

    part, model = Drifting(), nn.Sequential()
    trainer(tmp_path, [ll.LoRACallback(r=2, target_modules=["q_proj"], merge=False)], max_epochs=1).fit(part, data())
    assert "embed.weight" in ll.adapter_state_dict(part)
    model.append(part)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["q_proj"]))
    assert (ll.adapter_state_dict(model)["0.embed.weight"] == 1).all()


def test_a_part_remembers_itself_when_adapting_the_whole_fails() -> None:
    part, model, config = part_and_whole()
    values = ll.adapter_state_dict(part)
    model.append(unfreezable())
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        ll.inject_adapters(model, config)
    assert same(ll.adapter_state_dict(part), values)
    with pytest.raises(ll.AdapterStateError):
        ll.adapter_state_dict(model)
    ll.remove_adapters(part)
    assert (part[0].bias == 0).all()
    assert {name for name, trains in flags(part).items() if not trains} == {"1.bias"}


def test_the_whole_remembers_nothing_of_a_part_when_adapting_both_fails() -> None:
    part, _, config = part_and_whole()
    model = nn.Sequential(nn.Linear(4, 4))
    ll.inject_adapters(model, config)
    model.extend([part, unfreezable()])
    with pytest.raises(RuntimeError, match="cannot be frozen"):
        ll.inject_adapters(model, config)
    del model[2]
    ll.remove_adapters(part)
    nn.init.constant_(part[0].bias, 2)  # another base
    ll.remove_adapters(model)
    assert (part[0].bias == 2).all()


@pytest.mark.parametrize("change", ["changed before", "converted"])
def test_a_digest_is_not_handed_to_a_copy_with_other_values(change: str) -> None:
    record, weight = Record(AdapterState(ll.LoRAConfig())), torch.randn(100, 100)
    record.digests({"weight": weight})["weight"]
    if change == "changed before":
        weight[0, 1] += 1
    copy = weight.double() if change == "converted" else weight.clone()
    record.base_was_copied("weight", weight, copy)
    assert record.digests({"weight": copy})["weight"] == digest(copy)


# A call walks over a model few times


class Model(nn.Module):
    """Blocks of two linear layers and a norm, and a head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({name: nn.Linear(4, 4) for name in "qk"}) for _ in range(blocks))
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 2)


class Walks:
    """Counts the walks over all modules of a model: ours, torch's, and state dicts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for holder, name in ((names, "_walk"), (nn.Module, "named_modules"), (nn.Module, "state_dict")):
            monkeypatch.setattr(holder, name, self.counted(getattr(holder, name)))

    def counted(self, walk: Callable[..., Any]) -> Callable[..., Any]:
        def counting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.count += isinstance(module, Model)
            return walk(module, *args, **kwargs)

        return counting

    def of(self, call: Callable[[], Any]) -> int:
        before = self.count
        call()
        return self.count - before


def walks(blocks: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    model, config, file = Model(blocks), ll.LoRAConfig(r=2, modules_to_save=["head"]), folder / f"{blocks}.safetensors"
    calls: dict[str, Callable[[], Any]] = {
        "inject": lambda: ll.inject_adapters(model, config),
        "load_adapter_state_dict": lambda: ll.load_adapter_state_dict(model, ll.adapter_state_dict(model)),
        "save_adapter": lambda: ll.save_adapter(model, file),
        "load_adapter": lambda: ll.load_adapter(Model(blocks), file),
        "disable": lambda: ll.disable_adapters(model).__exit__(None, None, None),
        "merge": lambda: ll.merge_adapters(model),
        "summarize": lambda: ll.summarize(model),
        "unmerge": lambda: ll.unmerge_adapters(model),
        "remove": lambda: ll.remove_adapters(model),
    }
    with monkeypatch.context() as patch:
        counted = Walks(patch)
        return {name: counted.of(call) for name, call in calls.items()}


def test_walks_over_a_model_do_not_grow_with_its_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (walks(blocks, tmp_path, monkeypatch) for blocks in (2, 24))
    assert few == many
    assert max(few.values()) <= 16 and few["inject"] <= 5 and few["save_adapter"] <= 4 and few["merge"] <= 4

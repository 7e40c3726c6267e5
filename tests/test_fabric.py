"""Training loops of Fabric: its wrapper is seen through, and the files of its users are read."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.model.own_loop import early_optimizers
from lightning_lora.model.view import View
from tests.support.faults import unchanged
from tests.support.fits import adapted
from tests.support.models import (
    TRAINED,
    LitTiny,
    X,
    data,
    is_plain,
    lora,
    same,
    state,
    trainer,
)
from tests.support.parameters import base_parameters, trainable
from tests.support.ranks import run_ranks


def fabric(**kwargs: Any) -> L.Fabric:
    return L.Fabric(accelerator="cpu", **({"devices": 1} | kwargs))


def fit(fabric: L.Fabric, model: nn.Module) -> tuple[Any, Any]:
    """Train as Fabric's pages do; return the model and the optimizer as Fabric wraps them."""
    wrapped, optimizer = fabric.setup(
        model, torch.optim.Adam(trainable(model), lr=0.01)
    )
    for index, labels in fabric.setup_dataloaders(data()):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(wrapped(index), labels))
        optimizer.step()
    return wrapped, optimizer


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_every_call_sees_the_model_inside(tmp_path: Path) -> None:
    model = adapted()
    wrapped, _ = fit(fabric(), torch.compile(model, backend="eager"))
    trained = state(model)
    base = LitTiny()(X)
    assert type(wrapped).__name__ != type(model).__name__
    assert list(ll.adapter_state_dict(wrapped)) == TRAINED
    assert ll.summarize(wrapped).title == "LitTiny"
    assert ll.summarize(wrapped).trained == ll.summarize(model).trained
    ll.load_adapter_state_dict(wrapped, ll.adapter_state_dict(model))
    ll.save_adapter(wrapped, tmp_path / "a.safetensors")
    again = LitTiny()
    ll.load_adapter(again, tmp_path / "a.safetensors")
    assert same(state(again), trained)
    other = fabric().setup(LitTiny())
    ll.load_adapter(other, tmp_path / "a.safetensors")
    assert same(state(other), trained)
    with ll.disable_adapters(wrapped):
        assert torch.equal(wrapped(X), base)
    ll.export_peft(wrapped, tmp_path / "peft")
    ll.save_merged(wrapped, tmp_path / "merged.ckpt")
    ll.merge_adapters(wrapped)
    assert is_plain(model)
    assert same(
        LitTiny.load_from_checkpoint(tmp_path / "merged.ckpt").state_dict(),
        state(model),
    )
    ll.unmerge_adapters(wrapped)
    assert same(state(model), trained)
    ll.remove_adapters(wrapped)
    assert torch.equal(wrapped(X), base)
    with pytest.raises(ll.AdapterStateError, match="LitTiny has no adapters"):
        ll.save_adapter(wrapped, tmp_path / "b.safetensors")


# Files


def test_a_whole_model_in_a_file_of_fabric_is_loaded_onto_an_adapted_model(
    tmp_path: Path,
) -> None:
    f = fabric()
    model = adapted()
    wrapped, adam = fit(f, model)
    path = tmp_path / "a.ckpt"
    f.save(path, {"model": wrapped, "optimizer": adam})
    again, _ = f.setup(adapted(), torch.optim.Adam(adapted().parameters()))
    f.load(path, {"model": again})
    assert same(state(again.module), state(model))
    assert not same(state(model), state(adapted()))
    assert_refused_as_a_file_of_adapters(path)


def test_adapters_in_a_file_of_fabric_are_loaded_onto_an_adapted_model(
    tmp_path: Path,
) -> None:
    f = fabric()
    model = adapted()
    wrapped, adam = fit(f, model)
    path = tmp_path / "a.ckpt"
    f.save(path, {"model": ll.adapter_state_dict(wrapped), "optimizer": adam})
    again, _ = f.setup(adapted(), torch.optim.Adam(adapted().parameters()))
    ll.load_adapter_state_dict(again, f.load(path)["model"])
    assert same(state(again.module), state(model))
    assert not same(state(model), state(adapted()))
    assert_refused_as_a_file_of_adapters(path)


def assert_refused_as_a_file_of_adapters(path: Path) -> None:
    plain = LitTiny()
    with (
        unchanged(plain),
        pytest.raises(ll.AdapterFileError, match="load_adapter_state_dict"),
    ):
        ll.load_adapter(plain, path)


# Several processes


def train_in_two(folder: Path) -> dict[str, Tensor]:
    f = fabric(devices=2, strategy="ddp")
    f.launch()
    wrapped, _ = fit(f, adapted())
    assert type(wrapped._forward_module).__name__ == "DistributedDataParallel"
    ll.save_adapter(wrapped, folder / "a.safetensors")
    return ll.adapter_state_dict(wrapped)


@pytest.mark.processes
def test_two_processes_train_the_same_adapters_and_write_one_file(
    tmp_path: Path,
) -> None:
    first, second = run_ranks(train_in_two, tmp_path)
    assert same(first, second)
    assert first["q_proj.lora_B"].any()
    model = LitTiny()
    ll.load_adapter(model, tmp_path / "a.safetensors")
    assert same(ll.adapter_state_dict(model), first)


def adapt_late() -> None:
    f = fabric(devices=2, strategy="ddp")
    f.launch()
    model = f.setup(LitTiny())
    with pytest.raises(ll.AdapterStateError, match=r"before fabric.setup"):
        ll.inject_adapters(model, lora().config)
    assert is_plain(model)
    with pytest.raises(ll.AdapterStateError, match="before DistributedDataParallel"):
        ll.inject_adapters(
            nn.parallel.DistributedDataParallel(LitTiny()), ll.LoRAConfig(r=2)
        )
    ll.inject_adapters(f.setup(adapted()), lora().config)  # which has them already


@pytest.mark.processes
def test_adapters_that_come_after_the_processes_were_joined_are_refused() -> None:
    run_ranks(adapt_late)


# Optimizers


def test_an_optimizer_that_was_made_before_the_adapters_takes_no_step() -> None:
    model = LitTiny()
    before = torch.optim.Adam(model.parameters(), lr=0.01)
    before.step()
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    for _ in range(2):  # also where a cell runs again
        with pytest.raises(ll.OptimizerError, match=r"Adam holds .* and no adapter"):
            before.step()
    ll.remove_adapters(model)
    before.step()
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    before.add_param_group({"params": trainable(model)})
    before.step()


def test_an_optimizer_is_looked_at_once_in_several_processes_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = adapted()
    optimizer = torch.optim.Adam(trainable(model))
    looks: list[nn.Module] = []

    def look(seen: nn.Module) -> View:
        looks.append(seen)
        return View(seen)

    monkeypatch.setattr(early_optimizers, "View", look)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for _ in range(3):
        optimizer.step()
    assert looks.count(model) == 1


def test_an_early_optimizer_takes_no_step_although_a_head_would_train() -> None:
    model = LitTiny()
    early = torch.optim.Adam(model.parameters(), lr=0.01)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    before = state(model)
    model.loss(next(iter(data()))).backward()
    with pytest.raises(
        ll.OptimizerError, match=r"Adam holds 'q_proj.weight'.* and no adapter"
    ):
        early.step()
    assert same(state(model), before)


def test_a_second_optimizer_for_what_trains_beside_the_adapters_takes_its_steps() -> (
    None
):
    model = LitTiny()
    others = torch.optim.SGD(model.parameters(), lr=0.01)
    ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    # not stepped yet
    adapters = torch.optim.Adam(View(model).adapter_parameters.values())
    others.step()
    adapters.step()
    ll.inject_adapters(
        model, ll.LoRAConfig(r=2, modules_to_save=["head"]), name="second"
    )
    others.step()
    adapters.step()  # of the adapter that is inactive now: its gradients may wait


@pytest.mark.parametrize("has_stepped", [False, True])
@pytest.mark.parametrize("saved", [None, ["head"]])
def test_an_optimizer_of_an_adapter_that_rests_takes_no_step_for_another_one(
    saved: Any, has_stepped: bool
) -> None:
    model = LitTiny()
    config = ll.LoRAConfig(r=2, modules_to_save=saved)
    ll.inject_adapters(model, config, name="first")
    optimizer = torch.optim.Adam(trainable(model), lr=0.01)
    if has_stepped:
        model.loss(next(iter(data()))).backward()
        optimizer.step()
        optimizer.zero_grad()
    ll.inject_adapters(model, config, name="second")
    model.loss(next(iter(data()))).backward()
    with pytest.raises(
        ll.OptimizerError, match=r"Adam holds adapters of LitTiny that rest.*'second'"
    ):
        optimizer.step()
    of_the_second = torch.optim.Adam(trainable(model), lr=0.01)
    for each in (optimizer, of_the_second):  # a loop over both is no mistake
        each.step()


@pytest.mark.parametrize(
    "take_off",
    [
        ll.merge_adapters,
        ll.remove_adapters,
        lambda model: ll.merge_adapters(model, keep_base=False),
    ],
    ids=["merged", "removed", "merged for good"],
)
def test_an_optimizer_of_adapters_that_were_taken_off_takes_no_step(
    take_off: Any,
) -> None:
    model = LitTiny()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    optimizer = torch.optim.Adam(trainable(model), lr=0.01)
    optimizer.step()
    take_off(model)
    weights = state(model)
    model.loss(next(iter(data()))).backward()
    with pytest.raises(
        ll.OptimizerError,
        match=r"Adam holds adapters that were merged or removed.*'q_proj.weight'",
    ):
        optimizer.step()
    assert same(state(model), weights)
    torch.optim.Adam(model.parameters(), lr=0.01).step()
    optimizer.add_param_group(
        {"params": [p for p in model.parameters() if p not in set(held(optimizer))]}
    )
    optimizer.step()


def held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_an_optimizer_of_merged_adapters_takes_its_steps_when_they_are_back_or_their_weights_are_frozen() -> (
    None
):
    model = LitTiny().requires_grad_(False)
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    optimizer = torch.optim.Adam(trainable(model), lr=0.01)
    ll.merge_adapters(model)
    optimizer.step()
    ll.unmerge_adapters(model)
    optimizer.step()
    model.requires_grad_(True)
    optimizer.step()


class KeepsItsOptimizer(LitTiny):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.01)

    def configure_optimizers(self) -> Any:
        return self.optimizer


def test_a_plain_fit_with_the_optimizer_of_an_adapted_one_is_refused(
    tmp_path: Path,
) -> None:
    model = KeepsItsOptimizer()
    trainer(tmp_path, [lora(r=2)]).fit(model, data())
    with pytest.raises(
        ll.OptimizerError, match=r"in configure_optimizers, not in __init__"
    ):
        trainer(tmp_path).fit(model, data())
    trainer(tmp_path, [lora(r=2)]).fit(model, data())


def test_an_optimizer_of_anything_that_trains_takes_its_steps() -> None:
    model = LitTiny()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, modules_to_save=["head"]))
    adapters = torch.optim.Adam(View(model).adapter_parameters.values())
    others = torch.optim.Adam(base_parameters(model).values())  # which has the head
    adapters.step()
    others.step()
    model.q_proj.weight.requires_grad_(True)
    torch.optim.Adam([model.q_proj.weight]).step()
    torch.optim.Adam(nn.Linear(2, 2).parameters()).step()
    ll.merge_adapters(model)  # a plain model: all of it may train
    torch.optim.Adam(model.parameters()).step()

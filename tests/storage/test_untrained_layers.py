"""A layer that looks untrained and stays frozen is in every file: no run is lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

import lightning_lora as ll
from tests.support import fits
from tests.support.cases import tensors
from tests.support.compared import assert_same_state, assert_same_tensors, assert_state
from tests.support.models import (
    LitTiny,
    X,
    aged,
    as_trained,
    best,
    data,
    state,
    trainer,
)
from tests.support.storage import refused, saved

HEAD = {"head.weight", "head.bias"}


pytestmark = pytest.mark.filterwarnings("ignore::lightning_lora.FreshLayerWarning")


class NewHead(LitTiny):
    """A pretrained model whose head is random, in each process and each time another one."""

    def __init__(self) -> None:
        super().__init__(width=64)
        aged(self.embed)
        aged(self.q_proj)
        aged(self.v_proj)
        self.head.reset_parameters()


def callback(**kwargs: Any) -> ll.LoRACallback:
    return ll.LoRACallback(**{"r": 2, "target_modules": ["q_proj", "v_proj"], **kwargs})


def fit(
    folder: Path, model: LitTiny, callback: ll.LoRACallback, **options: Any
) -> LitTiny:
    saves = best(folder, filename="{epoch}", save_top_k=-1)
    fits.fit(folder, callback, saves, model=model, **options)
    return model


@pytest.mark.parametrize(
    ("targets", "save"),
    [
        (["q_proj", "v_proj"], "adapters"),
        ("all-linear", "model"),
        (["head"], "adapters"),
    ],
)
def test_a_run_with_a_forgotten_head_is_evaluated_and_goes_on(
    tmp_path: Path, targets: Any, save: Any
) -> None:
    model = fit(tmp_path, NewHead(), callback(target_modules=targets, save=save))
    last = tmp_path / "epoch=1.ckpt"
    first = tmp_path / "epoch=0.ckpt"
    (expected,) = trainer(tmp_path).test(model, data(), verbose=False)
    t = trainer(tmp_path, [ll.LoRACallback()])
    (found,) = t.test(NewHead(), data(), ckpt_path=last, verbose=False)
    assert found == pytest.approx(expected)
    merged = ll.load_from_checkpoint(NewHead, last, merge=True)
    torch.testing.assert_close(merged(X), model(X))
    again = fit(
        tmp_path / "again", NewHead(), callback(target_modules=targets), ckpt_path=first
    )
    assert_same_state(again, model)
    assert {*tensors(tmp_path / "again" / "epoch=1.ckpt")} >= HEAD


def test_the_own_head_comes_back_when_the_adapters_go(tmp_path: Path) -> None:
    model = saved(tmp_path / "a.safetensors", NewHead(), target_modules=["q_proj"])
    other = NewHead()
    before = state(other)
    ll.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(X), model(X))
    ll.merge_adapters(other)
    ll.save_adapter(other, tmp_path / "b.safetensors")
    third = NewHead()
    ll.load_adapter(third, tmp_path / "b.safetensors")
    assert torch.equal(third(X), model(X))
    ll.unmerge_adapters(other)
    ll.remove_adapters(other)
    assert_state(other, before)


def test_a_state_without_a_file_holds_the_head_too() -> None:
    model = as_trained(NewHead(), r=2, target_modules=["q_proj"])
    other = as_trained(NewHead(), r=2, target_modules=["q_proj"])
    ll.load_adapter_state_dict(other, ll.adapter_state_dict(model))
    assert torch.equal(other(X), model(X))


class Trained(nn.Linear):
    """A pretrained head, which refuses to be loaded with any other values."""

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        if not torch.equal(state[f"{prefix}weight"], self.weight):
            raise RuntimeError("It is another head.")
        super()._load_from_state_dict(state, prefix, *args)


def test_a_loading_that_fails_leaves_no_word_of_the_files_head(tmp_path: Path) -> None:
    fit(tmp_path, NewHead(), callback(merge=False), max_epochs=1)
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    model = NewHead()
    model.head = Trained(*model.head.weight.T.shape)
    aged(model.head)
    as_trained(model, r=2, target_modules=["q_proj", "v_proj"])
    before = ll.adapter_state_dict(model)
    with pytest.raises(RuntimeError, match="another head"):
        model.load_state_dict(checkpoint["state_dict"])
    assert_same_tensors(ll.adapter_state_dict(model), before)
    with_head = {**before, "head.bias": model.head.bias}
    with refused(model, ll.AdapterMismatchError, "unexpected 'head.bias'"):
        ll.load_adapter_state_dict(model, with_head)


def test_processes_write_the_same_head(tmp_path: Path) -> None:
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    model = fit(
        tmp_path, NewHead(), callback(), max_epochs=1, strategy=strategy, devices=2
    )
    assert {*tensors(tmp_path / "epoch=0.ckpt")} >= HEAD
    ll.remove_adapters(model)  # forgets what the processes left
    fit(tmp_path / "one", NewHead(), callback(), ckpt_path=tmp_path / "epoch=0.ckpt")


def test_an_export_to_peft_names_what_it_leaves_out(tmp_path: Path) -> None:
    model = NewHead()
    ll.inject_adapters(model, ll.LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.warns(
        ll.LoRAWarning,
        match=r"'head.weight', 'head.bias' may be untrained.*PEFT's format has no place",
    ):
        ll.export_peft(model, tmp_path / "peft")


# each run has its own head, and one model shows one of them
def test_adapters_with_heads_of_their_own_are_not_added(tmp_path: Path) -> None:
    model = NewHead()
    for name in ("de", "fr"):
        file = tmp_path / f"{name}.safetensors"
        saved(file, NewHead(), target_modules=["q_proj"])
        ll.load_adapter(model, file, name=name)
    shown = model(X)
    with pytest.raises(ll.AdapterMismatchError, match=r"'head.*looked untrained"):
        ll.set_adapter(model, ["de", "fr"])
    assert ll.adapters(model) == ("de", "fr")
    assert torch.equal(model(X), shown)

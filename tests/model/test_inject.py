"""An injection is done whole or not at all, and a call that fails leaves the model as it was."""

import copy
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora import moments
from lightning_lora.model.own_loop.trainer_only import TRAINER_ONLY
from lightning_lora.model.start_call import record_of
from lightning_lora.model.still.settle import settle, strip_adapters
from lightning_lora.model.view import View
from lightning_lora.networks.still_networks import StillNetworks
from tests.support.compared import assert_same_state, assert_same_tensors, assert_state
from tests.support.faults import fails_at, kinds, unchanged
from tests.support.models import LitTiny, randomise, state
from tests.support.parameters import add_to, trainable
from tests.support.storage import trained


def test_another_start_on_an_adapted_model_is_refused() -> None:
    model = LitTiny()
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    with (
        unchanged(model),
        pytest.raises(ll.AdapterMismatchError, match="adapted already"),
    ):
        ll.inject_adapters(model, ll.LoRAConfig(r=2, init="pissa"))


WITHOUT_TRAINER = {  # every argument that only a Trainer can serve
    "init": "init='lora_ga' starts from training data, which a Trainer has: use LoRACallback(init='lora_ga')",
    "init_batches": "init_batches=4 is a number of batches of training data, which a Trainer has",
}
VALUES: dict[str, Any] = {"init": "lora_ga", "init_batches": 4}


@pytest.mark.parametrize("name", WITHOUT_TRAINER)
def test_what_only_a_trainer_can_serve_is_refused(name: str) -> None:
    config = ll.LoRAConfig(**{name: VALUES[name]})
    model = LitTiny()
    with (
        unchanged(model),
        pytest.raises(ll.ConfigError, match=re.escape(WITHOUT_TRAINER[name])),
    ):
        ll.inject_adapters(model, config)
    ll.LoRACallback(**{name: VALUES[name]})


@pytest.mark.parametrize("is_merged", [False, True])
def test_a_new_adapter_that_only_a_trainer_can_start_is_refused_beside_one_that_has_learned(
    is_merged: bool,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    config = ll.LoRAConfig(r=2)
    ll.inject_adapters(model, config)
    # as what has learned
    ll.load_adapter_state_dict(model, ll.adapter_state_dict(model))
    needs_trainer = replace(config, init_batches=3)
    ll.inject_adapters(model, needs_trainer)  # it has started already
    if is_merged:
        ll.merge_adapters(model)
    name = "default" if is_merged else "other"
    with unchanged(model), pytest.raises(ll.ConfigError, match="init_batches=3"):
        ll.inject_adapters(model, needs_trainer, name=name)


def test_the_table_of_what_needs_a_trainer_is_complete() -> None:
    assert [each.name for each in TRAINER_ONLY] == list(WITHOUT_TRAINER)


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_model_with_pefts_adapters_is_refused(is_wrapped: bool) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["head"])
    theirs = peft.get_peft_model(LitTiny(), config)
    model = theirs if is_wrapped else theirs.get_base_model()
    with (
        unchanged(model),
        pytest.raises(
            ll.AdapterStateError, match=r"PEFT's adapters: .*q_proj'.*merge_and"
        ),
    ):
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
    ll.inject_adapters(theirs.merge_and_unload(), ll.LoRAConfig(r=2))


def test_injecting_something_else_is_an_error() -> None:
    with pytest.raises(ll.ConfigError, match="LoRAConfig"):
        ll.inject_adapters(nn.Linear(2, 2), {"r": 8})  # type: ignore[arg-type]
    with pytest.raises(
        ll.ConfigError,
        match=r"LoraConfig is PEFT's: write lightning_lora\.LoRAConfig\(r=",
    ):
        ll.inject_adapters(nn.Linear(2, 2), peft.LoraConfig(r=8))  # type: ignore[arg-type]


class Parallel(nn.parallel.DistributedDataParallel):
    """It stands around a module, and joins no other process."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


def test_adapters_come_before_the_wrapper_that_averages_gradients() -> None:
    model = LitTiny()
    config = ll.LoRAConfig(r=2)
    with (
        unchanged(model),
        pytest.raises(ll.AdapterStateError, match="before DistributedDataParallel"),
    ):
        ll.inject_adapters(Parallel(model), config)
    ll.inject_adapters(model, config)
    ll.inject_adapters(Parallel(model), config)  # which has them already


def test_adapters_that_are_made_or_unmerged_in_inference_mode_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.inference_mode():
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
    model(torch.ones(2, 4)).sum().backward()
    ll.merge_adapters(model)
    model.double()
    with torch.inference_mode():
        ll.unmerge_adapters(model)
    model(torch.ones(2, 4).double()).sum().backward()
    assert model[0].lora_B.grad is not None


def test_integer_parameters_of_a_module_that_trains_whole_stay() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["head"].codes = nn.Parameter(torch.arange(4), requires_grad=False)
    ll.inject_adapters(model, ll.LoRAConfig(r=1, modules_to_save=["head"]))
    assert model["head"].weight.requires_grad
    assert not model["head"].codes.requires_grad


def test_head_replaced_after_injection_is_the_one_that_counts() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    config = ll.LoRAConfig(r=1, modules_to_save=["1"])
    ll.inject_adapters(model, config)
    model[1] = nn.Linear(4, 3)
    ll.inject_adapters(model, config)
    ll.remove_adapters(model)
    assert model(torch.zeros(4)).shape == (3,)


def test_a_copy_in_an_adapted_module_still_follows_when_the_model_is_adapted() -> None:
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    pair = nn.ModuleDict({"student": student, "teacher": teacher})
    ll.inject_adapters(pair, ll.LoRAConfig(r=2))
    assert trainable(teacher) == []
    model = nn.ModuleDict({"pair": pair, "head": nn.Linear(4, 4)})
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    assert trainable(teacher) == []


def test_a_call_on_a_plain_model_says_what_to_do() -> None:
    with pytest.raises(ll.AdapterStateError, match="inject_adapters"):
        ll.merge_adapters(LitTiny())
    with pytest.raises(ll.AdapterStateError, match="'0': pass that module"):
        ll.merge_adapters(nn.Sequential(trained()))


def test_a_base_that_was_made_in_inference_mode_trains_and_is_given_back_as_it_was() -> (
    None
):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    with unchanged(model):
        ll.inject_adapters(model, ll.LoRAConfig(r=2))
        loss = model[0](torch.ones(2, 4)).sum()
        (grad,) = torch.autograd.grad(loss, model[0].lora_B, create_graph=True)
        assert grad.requires_grad
        ll.merge_adapters(model)
        ll.unmerge_adapters(model)
        ll.remove_adapters(model)


# A call that fails anywhere leaves the model as it was


class Model(nn.Module):
    """Layers of one weight and of several, a tied weight, a norm, and a buffer that grows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 6)
        self.rnn = nn.LSTM(6, 6, batch_first=True)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.extra = nn.Linear(7, 3)
        self.head.weight = self.embed.weight
        self.norm.weight.requires_grad_(False)
        self.register_buffer("bank", torch.zeros(0, 2))

    def forward(self, index: Tensor) -> Any:
        x, _ = self.rnn(self.embed(index))
        return self.extra(self.head(self.norm(x.mT).mT))


CONFIG = ll.LoRAConfig(
    r=2, target_modules=["rnn", "head"], modules_to_save=["extra"], bias="lora_only"
)
MORE = replace(CONFIG, target_modules=["embed", "rnn", "head"])
INDEX = torch.arange(7).view(1, 7)


def build(*, merged: bool, config: ll.LoRAConfig = CONFIG, rows: int = 3) -> Model:
    model = Model()
    ll.inject_adapters(model, config)
    randomise(model)
    add_to(model.extra.weight, 1)
    add_to(model.norm.running_mean, rows)
    model.bank = torch.ones(rows, 2)
    if merged:
        ll.merge_adapters(model)
    return model.eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    # its file does not hold what has changed in the others, and a load resets
    other = build(merged=False, rows=0)
    randomise(other, seed=8)
    ll.save_adapter(other, tmp_path / "a.safetensors")
    return tmp_path / "a.safetensors"


CONVERTED = replace(MORE, autocast_adapter_dtype=False)


def adapted() -> Model:
    return build(merged=False)


def merged() -> Model:
    return build(merged=True)


def merged_and_converted() -> Model:
    return build(merged=True, config=CONVERTED).bfloat16()


CALLS: dict[str, tuple[Callable[[], Model], Callable[[nn.Module, Path], Any]]] = {
    "merge": (adapted, lambda model, _: ll.merge_adapters(model)),
    "unmerge": (merged, lambda model, _: ll.unmerge_adapters(model)),
    "unmerge converted": (
        merged_and_converted,
        lambda model, _: ll.unmerge_adapters(model),
    ),
    "remove": (adapted, lambda model, _: ll.remove_adapters(model)),
    "load": (adapted, lambda model, file: ll.load_adapter(model, file)),
    "load merged": (merged, lambda model, file: ll.load_adapter(model, file)),
    "inject merged": (merged, lambda model, _: ll.inject_adapters(model, CONFIG)),
    "inject more": (adapted, lambda model, _: ll.inject_adapters(model, MORE)),
    "disable": (adapted, lambda model, _: ll.disable_adapters(model)),
    "disable merged": (merged, lambda model, _: ll.disable_adapters(model)),
}


PLACES = [*range(1, 40), *range(40, 5000, 9)]


@pytest.mark.filterwarnings("ignore::lightning_lora.LoRAWarning")
@pytest.mark.parametrize(("make", "call"), CALLS.values(), ids=CALLS)
def test_a_call_that_fails_anywhere_leaves_the_model_as_it_was(
    make: Any, call: Any, file: Path
) -> None:
    whole = make()
    exact = copy.deepcopy(whole)
    ll.unmerge_adapters(exact)
    before = state(whole)
    output = whole(INDEX)
    about = kinds(whole)
    stored = ll.adapter_state_dict(whole)
    for place in PLACES:
        model = copy.deepcopy(whole)
        # which torch and we may raise
        if not fails_at(place, partial(call, model, file), RuntimeError, ll.LoRAError):
            break
        assert_state(model, before)
        assert kinds(model) == about
        assert torch.equal(model(INDEX), output)
        assert_same_tensors(ll.adapter_state_dict(model), stored)
        ll.unmerge_adapters(model)  # neither base nor adapters were rounded on the way
        assert_same_state(model, exact)
    assert 5 < place < PLACES[-1]


def test_what_was_frozen_since_it_learned_and_then_thawed_counts_as_never_frozen() -> (
    None
):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = ll.LoRAConfig(r=2)
    ll.inject_adapters(model, config)
    # as what has learned
    ll.load_adapter_state_dict(model, ll.adapter_state_dict(model))
    known = record_of(model).base
    model[0].requires_grad_(False)
    ll.inject_adapters(model, config)
    assert known.frozen_since == {"0.weight"}
    model[0].requires_grad_(True)
    ll.inject_adapters(model, config)
    assert known.frozen_since == set()


def test_a_factor_that_other_code_froze_alone_trains_after_another_injection() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    model[0].lora_A.requires_grad_(False)
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    assert model[0].lora_A.requires_grad


REFUSED = {
    "matches nothing": (ll.TargetError, ll.LoRAConfig(r=2, target_modules=["nope"])),
    "another rank": (ll.AdapterMismatchError, ll.LoRAConfig(r=3)),
}


@pytest.mark.parametrize(("error", "config"), REFUSED.values(), ids=REFUSED)
def test_a_refused_injection_does_not_note_what_was_frozen_at_that_moment(
    error: type[Exception], config: ll.LoRAConfig
) -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    )
    names = ll.inject_adapters(model, ll.LoRAConfig(r=2))
    record = record_of(model)
    model[0].requires_grad_(False)
    with unchanged(model), pytest.raises(error):
        ll.inject_adapters(model, config)
    assert record_of(model) is record
    assert set(record.base.user_trains.values()) == {True}
    for name in ("lora_A", "lora_B"):
        model[0][0].get_parameter(name).requires_grad_(True)
    assert ll.inject_adapters(model, ll.LoRAConfig(r=2)) == names


def test_a_block_of_rows_still_shows_the_base_after_a_refused_injection() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
    base = model(x)
    for name in ("de", "fr"):
        ll.inject_adapters(model, ll.LoRAConfig(r=2), name=name)
        randomise(model)
    with ll.adapter_names(model, ["de", "fr"]):
        assert not torch.equal(model(x), base)
        with pytest.raises(ll.AdapterMismatchError):
            ll.inject_adapters(model, ll.LoRAConfig(r=3), name="fr")
        with ll.disable_adapters(model):
            assert torch.equal(model(x), base)


def test_a_frozen_network_with_adapters_of_its_own_is_refused_until_these_are_merged() -> (
    None
):
    model = nn.ModuleDict(
        {"encoder": nn.Sequential(nn.Linear(4, 4)), "head": nn.Linear(4, 4)}
    )
    config = ll.LoRAConfig(r=2)
    ll.inject_adapters(model["encoder"], config)
    model["encoder"].requires_grad_(False)
    with (
        unchanged(model),
        pytest.raises(
            ll.AdapterStateError,
            match="'encoder' of ModuleDict has adapters of its own",
        ),
    ):
        ll.inject_adapters(model, config)
    ll.merge_adapters(model["encoder"])
    ll.inject_adapters(model, config)
    assert model["encoder"][0].lora_A.requires_grad


def test_guards_are_told_of_the_chosen_layers_before_adapters_are_put_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers_of_adapted = []

    class Noting(moments.Guard):
        def layers_chosen(self, view: View, new: Collection[str]) -> None:
            numbers_of_adapted.append((len(view.layers), len(new)))

    monkeypatch.setattr(moments, "GUARDS", [Noting])
    names = ll.inject_adapters(LitTiny(), ll.LoRAConfig(r=2, target_modules=["q_proj"]))
    assert numbers_of_adapted == [(0, len(names))]


def test_a_network_that_lost_its_adapters_before_is_left_out_once() -> None:
    names = ("net", "teacher", "other")
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 4)) for name in names})
    ll.inject_adapters(model, ll.LoRAConfig(r=2))
    view = View(model)
    strip_adapters(view, ("teacher",))
    strip_adapters(view, ("teacher", "other"))
    assert view.adapter.networks.beside_training == ("teacher", "other")
    assert list(view.layers) == ["net.0"]


def test_beside_a_teacher_a_student_that_its_user_has_frozen_is_under_no_head() -> None:
    def network() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))

    model = nn.ModuleDict(
        {"student": network(), "teacher": network(), "norm": nn.LayerNorm(4)}
    )
    for frozen in ("teacher", "student"):
        model[frozen].requires_grad_(False)
        with pytest.warns(ll.LoRAWarning, match="No adapter for 'teacher'"):
            ll.inject_adapters(model, ll.LoRAConfig(r=2))
    view = View(model)
    settle(view, unheld=set())
    assert view.adapter.networks == StillNetworks(beside_training=("teacher",))

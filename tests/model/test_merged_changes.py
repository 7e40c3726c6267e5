"""A merged model that has changed is noticed, and no change is lost."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lightning_lora as ll
from tests.support.compared import assert_all_refused, assert_state
from tests.support.faults import unchanged
from tests.support.fits import fit
from tests.support.models import (
    LitTiny,
    TinyLM,
    as_merged,
    as_trained,
    data,
    lora,
    state,
    unties,
)
from tests.support.parameters import dtypes

CHANGED = "changed since its adapters were merged"


class Clips(LitTiny):
    """A module that clips all its weights after each step, as a WGAN's critic does: the frozen ones too."""

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for p in self.parameters():
            p.clamp_(-0.3, 0.3)


def assert_read_back(path: Path, model: LitTiny) -> None:
    """Expect what a file makes of a new module to compute the same."""
    index = torch.arange(8)
    fresh = Clips()
    ll.load_adapter(fresh, path)
    torch.testing.assert_close(fresh(index), model(index))


@pytest.mark.filterwarnings("ignore:Code has written:lightning_lora.LoRAWarning")
@pytest.mark.parametrize("merge", ["last", False])
def test_an_adapted_weight_that_a_run_changed_is_stored_without_its_update(
    tmp_path: Path, merge: Any
) -> None:
    model, t = fit(tmp_path, lora(merge=merge), model=Clips())
    index = torch.arange(8)
    ll.save_adapter(model, tmp_path / "a.safetensors")
    t.save_checkpoint(tmp_path / "a.ckpt")
    assert_read_back(tmp_path / "a.safetensors", model)
    assert_read_back(tmp_path / "a.ckpt", model)
    output = model(index)
    ll.load_adapter_state_dict(model, ll.adapter_state_dict(model))
    torch.testing.assert_close(model(index), output)
    ll.save_adapter(model, tmp_path / "b.safetensors")
    ll.load_adapter(Clips(), tmp_path / "b.safetensors")


TIED: dict[str, Callable[[TinyLM], Any]] = {
    "one use converted": lambda model: model.embed.half(),
    "the other converted": lambda model: model.lm_head.half(),
    "the other changed": lambda model: model.embed.weight.data.add_(1),
    "loaded by assignment": lambda model: model.load_state_dict(
        state(model), assign=True
    ),
}


@unties
@pytest.mark.parametrize("change", TIED.values(), ids=TIED)
def test_changes_of_a_tied_weight_that_was_merged_are_noticed(
    change: Callable[[TinyLM], Any],
) -> None:
    model = as_merged(TinyLM(), target_modules=["lm_head"])
    change(model)
    with unchanged(model), pytest.raises(ll.AdapterStateError, match=CHANGED):
        ll.unmerge_adapters(model)


def test_a_model_converted_while_its_adapters_are_disabled_is_of_one_dtype() -> None:
    model = LitTiny()
    ll.inject_adapters(
        model, ll.LoRAConfig(r=2, bias="lora_only", modules_to_save=["head"])
    )
    with ll.disable_adapters(model):
        model.double()
    assert dtypes(model) == {torch.float64}


def test_a_whole_whose_part_was_merged_by_itself_says_so(tmp_path: Path) -> None:
    part = nn.Sequential(nn.Linear(4, 4))
    whole = as_trained(nn.Sequential(part, nn.Linear(4, 4)))
    ll.inject_adapters(part, ll.LoRAConfig(r=2))
    before = state(whole)
    ll.merge_adapters(part)
    calls: list[Callable[[nn.Module], Any]] = [
        ll.merge_adapters,
        ll.remove_adapters,
        lambda model: ll.save_adapter(model, tmp_path / "a.safetensors"),
        lambda model: ll.disable_adapters(model),
    ]
    assert_all_refused(
        whole,
        calls,
        ll.AdapterStateError,
        r"'0\.0' of Sequential no longer have their adapters",
    )
    ll.unmerge_adapters(part)
    assert_state(whole, before)
    assert len(ll.adapter_state_dict(whole)) == 4


@pytest.mark.parametrize(
    ("targets", "tokens", "fused"),
    [
        (["0", "1"], [3, 70, 9_999], False),
        (["1"], range(100), True),  # torch does not count a fused step
    ],
)
def test_a_few_rows_that_trained_after_a_merge_are_noticed(
    targets: list[str], tokens: Any, fused: bool
) -> None:
    model = nn.Sequential(nn.Embedding(20_000, 64), nn.Linear(64, 4))
    as_merged(model, target_modules=targets)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=1.0, fused=fused)
    model(torch.tensor(tokens)).sum().backward()
    optimizer.step()
    with pytest.raises(ll.AdapterStateError, match=CHANGED):
        ll.unmerge_adapters(model)


@pytest.mark.parametrize(
    "name", ["0.weight", "1.weight"], ids=["beside the adapters", "merged"]
)
def test_a_merged_model_that_changed_after_a_conversion_is_not_unmerged(
    name: str,
) -> None:
    model = as_merged(nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 4)))
    model.bfloat16()
    with torch.no_grad():
        model.get_parameter(name)[0, 0] += 1
    with (
        unchanged(model),
        pytest.raises(ll.AdapterStateError, match="its base can be restored"),
    ):
        ll.unmerge_adapters(model)


def test_a_merged_model_with_disabled_adapters_is_refused_where_it_would_be_unmerged(
    tmp_path: Path,
) -> None:
    model, t = fit(tmp_path, lora())
    file = tmp_path / "a.ckpt"
    t.save_checkpoint(file)
    with unchanged(model), ll.disable_adapters(model):
        with pytest.raises(ll.AdapterStateError, match="shows its base"):
            ll.load_adapter(model, file)
        with pytest.raises(ll.AdapterStateError, match="shows its base"):
            t.test(model, data(), ckpt_path=file)
        with pytest.raises(ll.AdapterStateError, match="shows its base"):
            t.fit(model, data())


def test_a_base_that_is_part_of_a_larger_memory_is_kept_apart_from_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    nn.utils.vector_to_parameters(flat, model.parameters())
    as_trained(model, bias="all")
    before = state(model)
    ll.merge_adapters(model)
    merged = state(model)
    flat[:64].zero_()
    model.load_state_dict(merged)
    ll.unmerge_adapters(model)
    assert torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("base_first", [True, False])
def test_autocast_remembers_no_weight_of_another_model(base_first: bool) -> None:
    """It keeps half-precision copies of the weights it has met: not of those of the base, nor of merged ones."""
    model = as_trained(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        target_modules=["0"],
        modules_to_save=["1"],
    )
    nn.init.constant_(model[1].weight, 5)
    plain = copy.deepcopy(model)
    alike = copy.deepcopy(model)
    x = torch.randn(2, 4)
    ll.remove_adapters(plain)

    def check_base() -> None:
        expected = plain(x)
        with ll.disable_adapters(model):
            assert torch.equal(model(x), expected)

    def refuse_targets_without_adapters() -> None:
        assert torch.equal(model(x), alike(x))

    with torch.autocast("cpu", torch.bfloat16):
        if base_first:
            check_base()
        refuse_targets_without_adapters()
        check_base()
        refuse_targets_without_adapters()


@pytest.mark.filterwarnings("error:The weights of LitTiny were replaced")
def test_a_warning_that_is_an_error_drops_no_adapters(tmp_path: Path) -> None:
    model, t = fit(tmp_path, lora(merge="last"))
    merged = state(model)
    model.load_state_dict(LitTiny().state_dict())
    with pytest.raises(ll.LoRAWarning, match="were replaced"):
        t.fit(model, data())
    model.load_state_dict(merged)
    ll.unmerge_adapters(model)
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)

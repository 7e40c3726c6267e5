"""A fit or an evaluation of one adapter, beside others that rest."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_lora as ll
from lightning_lora.model.record import find_record
from tests.support.cases import held
from tests.support.fits import fit, outcome
from tests.support.models import LitTiny, X, best, data, lora, same, state, trainer

ROWS = torch.cat([index for index, _ in data()])


def two(tmp_path: Path, merge: Any = False) -> tuple[LitTiny, dict[str, Tensor]]:
    """A module with a trained "default" and "fr", "default" active, perhaps merged; and their values."""
    model, _ = fit(tmp_path / "fr", lora(merge=False, name="fr", r=1))
    fit(tmp_path / "default", lora(merge=merge, name="default"), model=model)
    return model, values(model)


def values(model: LitTiny) -> dict[str, Tensor]:
    """The output of each adapter, and of the base."""
    other = copy.deepcopy(model)
    ll.unmerge_adapters(other)
    found = {}
    for name in (None, *ll.adapters(other)):
        ll.set_adapter(other, name)
        found[str(name)] = other(X).detach()
    return found


@pytest.mark.parametrize("merge", ["last", False])
def test_no_gradient_is_left_when_a_fit_has_ended(tmp_path: Path, merge: Any) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora(merge=merge)], max_steps=1).fit(model, data())  # without a validation
    ll.unmerge_adapters(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("came", "merge"), [("last", "last"), (False, "best"), ("last", False)])
def test_a_fit_beside_others_has_the_bits_of_a_fit_alone(tmp_path: Path, merge: Any, came: Any) -> None:
    alone, _ = fit(tmp_path / "alone", lora(merge=merge, name="de"), best(tmp_path / "alone"))
    model, before = two(tmp_path, came)
    fit(tmp_path / "beside", lora(merge=merge, name="de"), best(tmp_path / "beside"), model=model)
    assert ll.adapters(model) == ("de", "fr", "default")
    assert same(state(model), state(alone))
    files = [sorted((tmp_path / run).glob("*.ckpt")) for run in ("alone", "beside")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]] and files[0]
    for one, other in zip(*files, strict=True):
        here, there = (torch.load(file, weights_only=True) for file in (one, other))
        assert same(held(here), held(there)) and here["lightning_lora"] == there["lightning_lora"]
    after = values(model)
    assert same({name: after[name] for name in before}, before)
    contents = []
    for saved in (model, alone):
        ll.save_adapter(saved, tmp_path / "de.safetensors")
        contents.append((tmp_path / "de.safetensors").read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize(("came", "name"), [("last", "fr"), (False, "de"), ("last", "de")])
def test_a_failing_set_up_gives_the_module_back_as_it_came(tmp_path: Path, came: Any, name: str) -> None:
    model, before = two(tmp_path, came)
    bits, names = state(model), ll.adapters(model)
    other = lora(name=name, rank_pattern={"k_proj": 99})
    with pytest.raises(ll.LoRAError):
        trainer(tmp_path, [other]).fit(model, data())
    assert same(state(model), bits) and ll.adapters(model) == names and same(values(model), before)
    record = find_record(model)
    assert record and record.is_merged is bool(came)


@pytest.mark.parametrize("came", ["last", False])
def test_an_evaluation_uses_the_adapter_that_it_names(tmp_path: Path, came: Any) -> None:
    model, before = two(tmp_path, came)
    bits = state(model)
    for name, expected in (("fr", "fr"), (None, "default"), ("default", "default")):
        given = {} if name is None else {"name": name}
        t = trainer(tmp_path, [ll.LoRACallback(**given)])
        torch.testing.assert_close(outcome(t, "predict", model), before[expected][ROWS])
        assert same(state(model), bits) and ll.adapters(model) == ("default", "fr")
    with pytest.raises(ll.AdapterStateError, match="no adapter 'df'"):
        trainer(tmp_path, [ll.LoRACallback(name="df")]).predict(model, data())
    assert same(state(model), bits) and same(values(model), before)


def test_a_fit_names_its_adapter_and_says_that_it_is_new(tmp_path: Path, caplog: Any, capsys: Any) -> None:
    caplog.set_level("INFO")
    model = LitTiny()
    for name, headline, line in (
        ("german", "LoRA 'german' (new): LitTiny trains", ""),
        ("germam", "LoRA 'germam' (new; 'german' rests): LitTiny", "a new adapter 'germam' beside 'german'.\n"),
        ("german", "LoRA 'german' (trained before; 'germam' rests): LitTiny", ""),
    ):
        caplog.clear()
        trainer(tmp_path, [lora(name=name)], enable_model_summary=True).fit(model, data())
        assert headline in capsys.readouterr().out
        assert line in caplog.text and ("begins a new" in caplog.text) is bool(line)
    about = "'german' (trained before; 'germam' rests"
    assert f"LitTiny is a plain model, with 2 adapters merged into it {about})" in str(ll.summarize(model))
    ll.unmerge_adapters(model)
    ll.disable_adapters(model)
    assert f"LoRA {about}; the base is shown): LitTiny" in str(ll.summarize(model))


def test_a_run_goes_on_from_its_file_beside_others(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    whole, _ = fit(tmp_path / "whole", lora(name="de", r=3), max_epochs=2)
    fit(tmp_path / "half", lora(name="de", r=3, merge=False), max_epochs=1)
    (file,) = (tmp_path / "half").rglob("*.ckpt")
    model, before = two(tmp_path)
    caplog.clear()
    fit(tmp_path / "on", ll.LoRACallback(name="de"), model=model, ckpt_path=file, max_epochs=2)
    assert "a new adapter" not in caplog.text
    assert same(state(model), state(whole))
    after = values(model)
    assert same({name: after[name] for name in before}, before)


def test_without_a_name_the_active_adapter_is_trained(tmp_path: Path) -> None:
    model, before = two(tmp_path)
    ll.set_adapter(model, "fr")
    fit(tmp_path, ll.LoRACallback(), model=model)
    after = values(model)
    assert ll.adapters(model) == ("fr", "default") and torch.equal(after["default"], before["default"])
    assert not torch.equal(after["fr"], before["fr"])


def test_a_fit_in_other_processes_keeps_the_others(tmp_path: Path) -> None:
    alone, _ = fit(tmp_path / "alone", lora(name="de"), strategy="ddp_fork")
    model, before = two(tmp_path, "last")
    fit(tmp_path / "forked", lora(name="de"), model=model, strategy="ddp_fork")
    assert ll.adapters(model) == ("de", "fr", "default") and same(state(model), state(alone))
    after = values(model)
    assert same({name: after[name] for name in before}, before)


@pytest.mark.parametrize("name", [None, "fr"])
def test_a_module_that_shows_its_base_is_evaluated_as_it_is_and_trained_by_name(tmp_path: Path, name: Any) -> None:
    model, before = two(tmp_path)
    ll.set_adapter(model, None)
    given = {} if name is None else {"name": name}
    t = trainer(tmp_path, [ll.LoRACallback(**given)])
    torch.testing.assert_close(outcome(t, "predict", model), before[str(name)][ROWS])
    assert torch.equal(model(X), before["None"])
    with pytest.raises(ll.LoRAError):
        trainer(tmp_path, [ll.LoRACallback(r=7, **given)]).fit(model, data())
    assert torch.equal(model(X), before["None"])
    fit(tmp_path, ll.LoRACallback(merge=False, **given), model=model)
    trained = name or "default"
    assert ll.adapters(model)[0] == trained and not torch.equal(model(X), before["None"])
    after = values(model)
    assert {name for name in before if not torch.equal(after[name], before[name])} == {trained}

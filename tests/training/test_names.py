"""A fit or an evaluation of one adapter, beside others that rest."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_lora as ll
from lightning_lora.model.records import find_record
from tests.support.cases import file_names, held
from tests.support.compared import assert_holds, assert_same_tensors
from tests.support.fits import fit, outcome
from tests.support.models import LitTiny, X, best, data, lora, state, trainer

ROWS = torch.cat([index for index, _ in data()])
"""What a prediction reads, of all that ``X`` has."""


def values(model: LitTiny) -> dict[str, Tensor]:
    """The output of each adapter, and of the base ("None")."""
    other = copy.deepcopy(model)
    ll.unmerge_adapters(other)
    found = {}
    for name in (None, *ll.adapters(other)):
        ll.set_adapter(other, name)
        found[str(name)] = other(X).detach()
    return found


def two(tmp_path: Path, merge: Any = False) -> tuple[LitTiny, dict[str, Tensor]]:
    """A module with a trained "default" and "fr", "default" active, perhaps merged; and their values."""
    model, _ = fit(tmp_path / "fr", lora(merge=False, name="fr", r=1))
    fit(tmp_path / "default", lora(merge=merge, name="default"), model=model)
    return model, values(model)


def callback_of(name: str | None, **arguments: Any) -> ll.LoRACallback:
    """A callback for the adapter of this name, or for none."""
    if name is not None:
        arguments["name"] = name
    return ll.LoRACallback(**arguments)


@pytest.mark.parametrize("merge", ["last", False])
def test_no_gradient_is_left_when_a_fit_has_ended(tmp_path: Path, merge: Any) -> None:
    model = LitTiny()
    # without a validation
    trainer(tmp_path, [lora(merge=merge)], max_steps=1).fit(model, data())
    ll.unmerge_adapters(model)
    for p in model.parameters():
        assert p.grad is None


# A fit beside others


def assert_same_files(found: Path, expected: Path) -> None:
    """Both folders have checkpoints of the same names, which hold the same adapters."""
    names = file_names(expected, "*.ckpt")
    assert names
    assert file_names(found, "*.ckpt") == names
    for name in names:
        ours = torch.load(found / name, weights_only=True)
        theirs = torch.load(expected / name, weights_only=True)
        assert_same_tensors(held(ours), held(theirs))
        assert ours["lightning_lora"] == theirs["lightning_lora"]


def adapter_file_of(model: LitTiny, file: Path) -> bytes:
    ll.save_adapter(model, file)
    return file.read_bytes()


@pytest.mark.parametrize(
    ("came", "merge"), [("last", "last"), (False, "best"), ("last", False)]
)
def test_a_fit_beside_others_has_the_bits_of_a_fit_alone(
    tmp_path: Path, merge: Any, came: Any
) -> None:
    alone, _ = fit(
        tmp_path / "alone", lora(merge=merge, name="de"), best(tmp_path / "alone")
    )
    model, before = two(tmp_path, came)
    fit(
        tmp_path / "beside",
        lora(merge=merge, name="de"),
        best(tmp_path / "beside"),
        model=model,
    )
    assert ll.adapters(model) == ("de", "fr", "default")
    assert_same_tensors(state(model), state(alone))
    assert_same_files(tmp_path / "beside", tmp_path / "alone")
    assert_holds(values(model), before)
    file = tmp_path / "de.safetensors"
    assert adapter_file_of(model, file) == adapter_file_of(alone, file)


@pytest.mark.parametrize(
    ("came", "name"), [("last", "fr"), (False, "de"), ("last", "de")]
)
def test_a_failing_set_up_gives_the_module_back_as_it_came(
    tmp_path: Path, came: Any, name: str
) -> None:
    model, before = two(tmp_path, came)
    bits = state(model)
    names = ll.adapters(model)
    other = lora(name=name, rank_pattern={"k_proj": 99})
    with pytest.raises(ll.LoRAError):
        trainer(tmp_path, [other]).fit(model, data())
    assert_same_tensors(state(model), bits)
    assert ll.adapters(model) == names
    assert_same_tensors(values(model), before)
    record = find_record(model)
    assert record is not None
    assert record.state.is_merged is bool(came)


@pytest.mark.parametrize("came", ["last", False])
def test_an_evaluation_uses_the_adapter_that_it_names(
    tmp_path: Path, came: Any
) -> None:
    model, before = two(tmp_path, came)
    bits = state(model)
    for name, expected in (("fr", "fr"), (None, "default"), ("default", "default")):
        t = trainer(tmp_path, [callback_of(name)])
        predicted = outcome(t, "predict", model)
        torch.testing.assert_close(predicted, before[expected][ROWS])
        assert_same_tensors(state(model), bits)
        assert ll.adapters(model) == ("default", "fr")
    with pytest.raises(ll.AdapterStateError, match="no adapter 'df'"):
        trainer(tmp_path, [callback_of("df")]).predict(model, data())
    assert_same_tensors(state(model), bits)
    assert_same_tensors(values(model), before)


def test_a_fit_names_its_adapter_and_says_that_it_is_new(
    tmp_path: Path, caplog: Any, capsys: Any
) -> None:
    caplog.set_level("INFO")
    model = LitTiny()

    def headline_of_a_fit(name: str) -> str:
        caplog.clear()
        trainer(tmp_path, [lora(name=name)], enable_model_summary=True).fit(
            model, data()
        )
        return str(capsys.readouterr().out)

    assert "LoRA 'german' (new): LitTiny trains" in headline_of_a_fit("german")
    assert "begins a new" not in caplog.text
    assert "LoRA 'germam' (new; 'german' rests): LitTiny" in headline_of_a_fit("germam")
    assert "begins a new" in caplog.text
    assert "a new adapter 'germam' beside 'german'.\n" in caplog.text
    assert (
        "LoRA 'german' (trained before; 'germam' rests): LitTiny"
        in headline_of_a_fit("german")
    )
    assert "begins a new" not in caplog.text
    about = "'german' (trained before; 'germam' rests"
    assert f"LitTiny is a plain model, with 2 adapters merged into it {about})" in str(
        ll.summarize(model)
    )
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
    fit(tmp_path / "on", callback_of("de"), model=model, ckpt_path=file, max_epochs=2)
    assert "a new adapter" not in caplog.text
    assert_same_tensors(state(model), state(whole))
    assert_holds(values(model), before)


def test_without_a_name_the_active_adapter_is_trained(tmp_path: Path) -> None:
    model, before = two(tmp_path)
    ll.set_adapter(model, "fr")
    fit(tmp_path, callback_of(None), model=model)
    after = values(model)
    assert ll.adapters(model) == ("fr", "default")
    assert torch.equal(after["default"], before["default"])
    assert not torch.equal(after["fr"], before["fr"])


def test_a_fit_in_other_processes_keeps_the_others(tmp_path: Path) -> None:
    alone, _ = fit(tmp_path / "alone", lora(name="de"), strategy="ddp_fork")
    model, before = two(tmp_path, "last")
    fit(tmp_path / "forked", lora(name="de"), model=model, strategy="ddp_fork")
    assert ll.adapters(model) == ("de", "fr", "default")
    assert_same_tensors(state(model), state(alone))
    assert_holds(values(model), before)


@pytest.mark.parametrize(
    ("name", "trained", "rests"), [(None, "default", "fr"), ("fr", "fr", "default")]
)
def test_a_module_that_shows_its_base_is_evaluated_as_it_is_and_trained_by_name(
    tmp_path: Path, name: Any, trained: str, rests: str
) -> None:
    model, before = two(tmp_path)
    ll.set_adapter(model, None)
    t = trainer(tmp_path, [callback_of(name)])
    predicted = outcome(t, "predict", model)
    torch.testing.assert_close(predicted, before[str(name)][ROWS])
    assert torch.equal(model(X), before["None"])
    with pytest.raises(ll.LoRAError):
        trainer(tmp_path, [callback_of(name, r=7)]).fit(model, data())
    assert torch.equal(model(X), before["None"])
    fit(tmp_path, callback_of(name, merge=False), model=model)
    assert ll.adapters(model)[0] == trained
    assert not torch.equal(model(X), before["None"])
    after = values(model)
    assert not torch.equal(after[trained], before[trained])
    assert torch.equal(after[rests], before[rests])
    assert torch.equal(after["None"], before["None"])

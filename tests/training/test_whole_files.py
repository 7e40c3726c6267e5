"""With ``save="model"``, any code reads the files, and a run goes on from them."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import lightning.pytorch.callbacks as bundled
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

import lightning_lora as ll
from lightning_lora.model.view import View
from tests.support import fits
from tests.support.cases import At, StopError, stop
from tests.support.compared import assert_same_tensors
from tests.support.fits import WritesLater, loaded, outcome
from tests.support.messages import messages_of
from tests.support.models import TRAINED, LitTiny, TinyLM, X, best, lora, state, trainer
from tests.support.parameters import cloned
from tests.support.versions import needs_averaging
from tests.training.test_compiled import Compiled


def whole(**kwargs: Any) -> ll.LoRACallback:
    return lora(save="model", **kwargs)


def read(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def state_in(path: Path) -> dict[str, Any]:
    """The state of the module that a file holds."""
    found: dict[str, Any] = read(path)["state_dict"]
    return found


def merged_at(path: Path) -> dict[str, Any]:
    """The state of a base with the adapters of a file merged, by this package."""
    model = loaded(path)
    ll.merge_adapters(model)
    ll.remove_adapters(model)
    return state(model)


def plain_of(given: dict[str, Any]) -> LitTiny:
    """A module with this state, by torch."""
    model = LitTiny()
    model.load_state_dict(given)
    return model


def fit(folder: Path, *callbacks: L.Callback, **options: Any) -> LitTiny:
    """A fit whose last file is ``last.ckpt``, and whose best one is ``best.ckpt``."""
    saves = best(folder, filename="best", save_last=True)
    model, _ = fits.fit(folder, *callbacks, saves, **options)
    return model


def saves_at(step: int, file: Path, **options: Any) -> L.Callback:
    """Write a file before a step."""
    return At(step, lambda t, _: t.save_checkpoint(file, **options))


def test_every_file_holds_the_merged_model_and_the_adapters(tmp_path: Path) -> None:
    callbacks = [
        saves_at(2, tmp_path / "during.ckpt"),
        saves_at(3, tmp_path / "light.ckpt", weights_only=True),
        At(7, stop),
        best(tmp_path, save_last=True),
        ModelCheckpoint(
            tmp_path / "weights", save_weights_only=True, every_n_train_steps=2
        ),
        OnExceptionCheckpoint(tmp_path, "failed"),
    ]
    with pytest.raises(StopError):
        fits.fit(tmp_path, whole(), *callbacks)
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert len(files) == 6
    for file in files:
        assert_same_tensors(state_in(file), merged_at(file))
        assert sorted(read(file)["lightning_lora"]["adapters"]) == sorted(TRAINED)
        by_lightning = LitTiny.load_from_checkpoint(file)
        assert_same_tensors(state(by_lightning), state_in(file))


# What other code loads


@pytest.mark.parametrize(
    ("merge", "plugins"), [("last", [WritesLater()]), (False, None)]
)
def test_the_adapters_of_the_best_state_are_in_reach_once_other_code_has_loaded_it(
    tmp_path: Path, merge: Any, plugins: Any
) -> None:
    file = tmp_path / "first.ckpt"
    model = fit(tmp_path, whole(merge=merge), saves_at(4, file), plugins=plugins)
    first = loaded(file)
    assert not torch.allclose(first(X), model(X))
    model.load_state_dict(state_in(file))
    torch.testing.assert_close(model(X), first(X))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    from_file = loaded(tmp_path / "a.safetensors")
    assert_same_tensors(ll.adapter_state_dict(from_file), ll.adapter_state_dict(first))
    ll.export_peft(model, tmp_path / "peft")
    ll.unmerge_adapters(model)
    assert_same_tensors(state(model), state(first))


State = dict[str, Any]


def states_that_do_not_fit(folder: Path) -> list[tuple[State, dict[str, Any], State]]:
    """Whole states, each with arguments of a fit that they do not fit, and the last state of their run."""
    fit(folder, whole(), saves_at(4, folder / "first.ckpt"))
    averaged = state_in(folder / "first.ckpt")
    last = state_in(folder / "last.ckpt")
    # as code that averages files does: the notes on them stay
    for name, value in averaged.items():
        value.add_(last[name]).div_(2)
    without_the_notes = cloned(last)
    return [(averaged, {}, last), (last, {"r": 4}, last), (without_the_notes, {}, last)]


def test_a_whole_state_that_was_changed_or_does_not_fit_is_loaded_as_it_is(
    tmp_path: Path,
) -> None:
    for given, arguments, last in states_that_do_not_fit(tmp_path):
        model = fit(tmp_path / "again", whole(merge="last", **arguments), max_epochs=1)
        model.load_state_dict(given)
        assert_same_tensors(state(model), given)
        with pytest.raises(ll.AdapterStateError, match="were changed since"):
            ll.unmerge_adapters(model)
        model.load_state_dict(last)
        assert_same_tensors(state(model), last)


def test_adapters_that_are_there_begin_anew_on_a_whole_state_that_does_not_fit(
    tmp_path: Path,
) -> None:
    for given, arguments, _ in states_that_do_not_fit(tmp_path):
        model = fit(tmp_path / "again", whole(merge=False, **arguments), max_epochs=1)
        with pytest.warns(ll.LoRAWarning, match=r"hold merged updates.*begin anew"):
            model.load_state_dict(given, strict=False)
        assert torch.equal(model(X), plain_of(given)(X))


@pytest.mark.parametrize("averages", [False, pytest.param(True, marks=needs_averaging)])
def test_a_module_that_other_code_gave_other_weights_is_saved_as_it_is(
    tmp_path: Path, averages: bool
) -> None:
    callbacks: list[L.Callback] = [whole()]
    if averages:
        callbacks.append(bundled.EMAWeightAveraging(decay=0.5))
    model = fit(tmp_path, *callbacks)
    other = {
        name: value + 1 for name, value in state_in(tmp_path / "best.ckpt").items()
    }
    model.load_state_dict(other)
    with pytest.warns(ll.LoRAWarning, match="were replaced"):
        model.trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_same_tensors(state_in(tmp_path / "after.ckpt"), state(model))


@pytest.mark.parametrize(
    "config",
    [ll.LoRAConfig(r=2), lora().config],
    ids=["another fine-tune", "a like one"],
)
def test_an_update_is_never_counted_twice(
    tmp_path: Path, config: ll.LoRAConfig
) -> None:
    file = tmp_path / "last.ckpt"
    model = fit(tmp_path, whole())
    given = state_in(file)
    merged = plain_of(given)
    ll.unmerge_adapters(model)
    model.load_state_dict(given)
    torch.testing.assert_close(model(X), merged(X))
    with pytest.raises(
        ll.BaseMismatchError, match="If this model is merged, load its base"
    ):
        ll.load_adapter(plain_of(given), file)
    fresh = LitTiny()
    ll.inject_adapters(fresh, config)
    fresh.load_state_dict(given, strict=False)  # on the merged model
    assert torch.equal(fresh(X), merged(X))
    assert View(fresh).is_fresh()


def test_only_the_whole_module_can_tell_a_merged_layer_from_another_base(
    tmp_path: Path,
) -> None:
    fit(tmp_path, whole())
    given = state_in(tmp_path / "last.ckpt")
    part = {"weight": given["q_proj.weight"], "bias": given["q_proj.bias"]}
    model = fit(tmp_path, whole(merge=False))
    with pytest.warns(
        ll.LoRAWarning, match="below trained adapters.*these count twice"
    ):
        model.q_proj.load_state_dict(part)


# Runs that go on, averages and processes


@pytest.mark.parametrize(
    ("written", "resumed"), [("adapters", "model"), ("model", "adapters")]
)
def test_a_run_goes_on_from_it_to_the_bit(
    tmp_path: Path, written: Any, resumed: Any
) -> None:
    unbroken = fit(tmp_path / "a", lora(dropout=0.3))
    fit(tmp_path / "b", lora(dropout=0.3, save=written), max_epochs=1)
    file = tmp_path / "b" / "last.ckpt"
    model = fit(tmp_path / "b", lora(dropout=0.3, save=resumed), ckpt_path=file)
    assert_same_tensors(state(model), state(unbroken))
    ll.unmerge_adapters(model)
    ll.unmerge_adapters(unbroken)
    assert_same_tensors(state(model), state(unbroken))


def averaged_and_resumed(folder: Path, save: str) -> LitTiny:
    """The module after a run with an average, which went on from its first file."""
    fit(folder, lora(save=save), bundled.EMAWeightAveraging(decay=0.5), max_epochs=1)
    file = folder / "last.ckpt"
    if save == "model":
        assert_same_tensors(state_in(file), merged_at(file))
    return fit(
        folder, lora(save=save), bundled.EMAWeightAveraging(decay=0.5), ckpt_path=file
    )


@needs_averaging
def test_averages_are_merged_and_the_run_goes_on_from_the_weights_themselves(
    tmp_path: Path,
) -> None:
    of_adapters = averaged_and_resumed(tmp_path / "adapters", "adapters")
    of_model = averaged_and_resumed(tmp_path / "model", "model")
    assert_same_tensors(state(of_model), state(of_adapters))


def test_processes_write_the_file_of_one(tmp_path: Path) -> None:
    fit(tmp_path / "one", whole(), max_epochs=1)
    fit(tmp_path / "two", whole(), max_epochs=1, strategy="ddp_fork", devices=2)
    of_one = tmp_path / "one" / "last.ckpt"
    of_two = tmp_path / "two" / "last.ckpt"
    assert_same_tensors(state_in(of_two), merged_at(of_two))
    assert list(state_in(of_one)) == list(state_in(of_two))


def test_a_whole_file_is_evaluated_as_any_checkpoint(tmp_path: Path) -> None:
    model = fit(tmp_path, whole(use_dora=True))
    other = LitTiny()
    nn.init.ones_(other.embed.weight)  # not its base: it need not be there
    t = trainer(tmp_path, [ll.LoRACallback()])
    tested = outcome(t, "test", other, ckpt_path=tmp_path / "last.ckpt")
    expected = outcome(trainer(tmp_path), "test", model)
    torch.testing.assert_close(tested, expected)
    assert_same_tensors(state(other), state(model))


def test_a_run_goes_on_in_a_module_with_the_merged_weights_of_its_file(
    tmp_path: Path, caplog: Any
) -> None:
    unbroken = fit(tmp_path / "a", whole(init="pissa"))
    fit(tmp_path / "b", whole(init="pissa"), max_epochs=1)
    file = tmp_path / "b" / "last.ckpt"
    for save in ("adapters", "model"):
        built = LitTiny.load_from_checkpoint(file)
        model = fit(
            tmp_path / save, lora(init="pissa", save=save), model=built, ckpt_path=file
        )
        assert "holds the merged weights" in caplog.text
        assert "up to rounding" in caplog.text
        torch.testing.assert_close(state(model), state(unbroken))
        again = tmp_path / save / "last.ckpt"
        on_the_base = loaded(again)
        torch.testing.assert_close(on_the_base(X), model(X))
        assert again.stat().st_size < 40_000
    built = LitTiny.load_from_checkpoint(again)
    t = trainer(tmp_path, [ll.LoRACallback()])
    tested = outcome(t, "test", built, ckpt_path=again)
    expected = outcome(trainer(tmp_path), "test", model)
    torch.testing.assert_close(tested, expected)
    other = LitTiny.load_from_checkpoint(again)
    other.embed.weight.data[0, 0] += 1
    with pytest.raises(ll.BaseMismatchError):
        fit(tmp_path / "c", whole(init="pissa"), model=other, ckpt_path=again)


def test_names_of_compiled_parts_are_those_of_the_module(tmp_path: Path) -> None:
    fit(tmp_path, whole(), model=Compiled(), max_epochs=1)
    Compiled().load_state_dict(state_in(tmp_path / "last.ckpt"))


# What is refused, and what is said


class Tied(LitTiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = TinyLM()


class Renames(LitTiny):
    """A module whose own state dict has other names."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        usual = super().state_dict(*args, **kwargs)
        return {f"mine.{name}": value for name, value in usual.items()}


def quantised() -> LitTiny:
    bnb = pytest.importorskip("bitsandbytes")
    model = LitTiny(width=64)
    model.q_proj = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (Tied, {"target_modules": ["embed"]}, "a weight of 'net.embed' is tied"),
        (quantised, {"merge": False}, "'q_proj' are quantised"),
        (Renames, {}, "own state_dict does not hold 'q_proj.weight'"),
    ],
)
def test_what_could_not_be_read_rightly_is_refused(
    tmp_path: Path, make: Any, arguments: Any, match: str
) -> None:
    adapters = ll.LoRACallback(r=2, save="model", **arguments)
    with pytest.raises(
        ll.ConfigError,
        match=f"save='model' is not possible.*{match}.*Or set save='adapters'",
    ):
        fits.fit(tmp_path, adapters, model=make())


def test_another_value_of_save_is_refused() -> None:
    with pytest.raises(ll.ConfigError, match="save='all' is not valid"):
        ll.LoRACallback(save="all")  # type: ignore[arg-type]


def test_rounding_of_much_of_an_update_is_said_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit(tmp_path, whole(merge=False), model=LitTiny(lr=1e-4), precision="bf16-true")
    (said,) = messages_of(caught, ll.MergePrecisionWarning)
    assert said.startswith('With save="model", f')

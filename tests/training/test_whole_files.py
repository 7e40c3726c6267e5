"""With ``save="model"``, any code reads the files, and a run goes on from them."""

import warnings
from contextlib import nullcontext
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
from tests.support.fits import WritesLater, loaded, outcome
from tests.support.models import TRAINED, LitTiny, TinyLM, X, best, lora, same, state, trainer
from tests.support.versions import needs_averaging
from tests.training.test_compiled import Compiled


def whole(**kwargs: Any) -> ll.LoRACallback:
    return lora(save="model", **kwargs)


def read(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


def merged_at(path: Path) -> dict[str, Any]:
    """The state of a base with the adapters of a file merged, by this package."""
    ll.load_adapter(model := LitTiny(), path)
    ll.merge_adapters(model)
    ll.remove_adapters(model)
    return state(model)


def test_every_file_holds_the_merged_model_and_the_adapters(tmp_path: Path) -> None:
    callbacks = [
        At(2, lambda t, m: t.save_checkpoint(tmp_path / "during.ckpt")),
        At(3, lambda t, m: t.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)),
        At(7, stop),
        best(tmp_path, save_last=True),
        ModelCheckpoint(tmp_path / "weights", save_weights_only=True, every_n_train_steps=2),
        OnExceptionCheckpoint(tmp_path, "failed"),
    ]
    with pytest.raises(StopError):
        fits.fit(tmp_path, whole(), *callbacks)
    files = sorted(tmp_path.rglob("*.ckpt"))
    assert len(files) == 6
    for file in files:
        checkpoint = read(file)
        assert same(checkpoint["state_dict"], merged_at(file)), file
        assert sorted(checkpoint["lightning_lora"]["adapters"]) == sorted(TRAINED)
        assert same(state(LitTiny.load_from_checkpoint(file)), checkpoint["state_dict"])


def fit(folder: Path, *callbacks: L.Callback, **options: Any) -> LitTiny:
    """A fit whose last file is ``last.ckpt``, and whose best one is ``best.ckpt``."""
    saves = best(folder, filename="best", save_last=True)
    model: LitTiny = fits.fit(folder, *callbacks, saves, **options)[0]
    return model


def first(folder: Path) -> L.Callback:
    """Write another file than the last one."""
    return At(4, lambda t, _: t.save_checkpoint(folder / "first.ckpt"))


@pytest.mark.parametrize(("merge", "later"), [("last", True), (False, False)])
def test_the_adapters_of_the_best_state_are_in_reach_once_other_code_has_loaded_it(
    tmp_path: Path, merge: Any, later: bool
) -> None:
    model = fit(tmp_path, whole(merge=merge), first(tmp_path), plugins=[WritesLater()] if later else None)
    best = loaded(tmp_path / "first.ckpt")
    assert not torch.allclose(best(X), model(X))
    model.load_state_dict(read(tmp_path / "first.ckpt")["state_dict"])
    torch.testing.assert_close(model(X), best(X))
    ll.save_adapter(model, tmp_path / "a.safetensors")
    assert same(ll.adapter_state_dict(loaded(tmp_path / "a.safetensors")), ll.adapter_state_dict(best))
    ll.export_peft(model, tmp_path / "peft")
    ll.unmerge_adapters(model)
    assert same(state(model), state(best))


def test_a_whole_state_that_was_changed_or_does_not_fit_is_loaded_as_it_is(tmp_path: Path) -> None:
    fit(tmp_path, whole(), first(tmp_path))
    file, other = (read(tmp_path / f"{name}.ckpt")["state_dict"] for name in ("first", "last"))
    for name, value in file.items():
        value.add_(other[name]).div_(2)  # as code that averages files does: the notes on them stay
    copied = {name: value.clone() for name, value in other.items()}  # without the notes
    for given, arguments in ((file, {}), (other, {"r": 4}), (copied, {})):
        for merge in ("last", False):
            model = fit(tmp_path / "again", whole(merge=merge, **arguments), max_epochs=1)
            with nullcontext() if merge else pytest.warns(ll.LoRAWarning, match=r"hold merged updates.*begin anew"):
                model.load_state_dict(given, strict=bool(merge))
            assert same(state(model), given) if merge else torch.equal(model(X), plain_of(given)(X))
            if merge:
                with pytest.raises(ll.AdapterStateError, match="were changed since"):
                    ll.unmerge_adapters(model)
                model.load_state_dict(other)
                assert same(state(model), other)


def plain_of(given: dict[str, Any]) -> LitTiny:
    model = LitTiny()
    model.load_state_dict(given)
    return model


@pytest.mark.parametrize("averages", [False, pytest.param(True, marks=needs_averaging)])
def test_a_module_that_other_code_gave_other_weights_is_saved_as_it_is(tmp_path: Path, averages: bool) -> None:
    model = fit(tmp_path, whole(), *([bundled.EMAWeightAveraging(decay=0.5)] if averages else []))
    model.load_state_dict({name: value + 1 for name, value in read(tmp_path / "best.ckpt")["state_dict"].items()})
    with pytest.warns(ll.LoRAWarning, match="were replaced"):
        model.trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert same(read(tmp_path / "after.ckpt")["state_dict"], state(model))


@pytest.mark.parametrize(("written", "resumed"), [("adapters", "model"), ("model", "adapters")])
def test_a_run_goes_on_from_it_to_the_bit(tmp_path: Path, written: Any, resumed: Any) -> None:
    unbroken = fit(tmp_path / "a", lora(dropout=0.3))
    fit(tmp_path / "b", lora(dropout=0.3, save=written), max_epochs=1)
    model = fit(tmp_path / "b", lora(dropout=0.3, save=resumed), ckpt_path=tmp_path / "b" / "last.ckpt")
    for _ in range(2):  # merged, and unmerged
        assert same(state(model), state(unbroken))
        ll.unmerge_adapters(model)
        ll.unmerge_adapters(unbroken)


@needs_averaging
def test_averages_are_merged_and_the_run_goes_on_from_the_weights_themselves(tmp_path: Path) -> None:
    states = {}
    for save in ("adapters", "model"):
        folder = tmp_path / save
        fit(folder, lora(save=save), bundled.EMAWeightAveraging(decay=0.5), max_epochs=1)
        file = folder / "last.ckpt"
        if save == "model":
            assert same(read(file)["state_dict"], merged_at(file))
        states[save] = state(fit(folder, lora(save=save), bundled.EMAWeightAveraging(decay=0.5), ckpt_path=file))
    assert same(states["adapters"], states["model"])


def test_processes_write_the_file_of_one(tmp_path: Path) -> None:
    fit(tmp_path / "one", whole(), max_epochs=1)
    fit(tmp_path / "two", whole(), max_epochs=1, strategy="ddp_fork", devices=2)
    one, two = (read(tmp_path / name / "last.ckpt") for name in ("one", "two"))
    assert same(two["state_dict"], merged_at(tmp_path / "two" / "last.ckpt"))
    assert list(one["state_dict"]) == list(two["state_dict"])


def test_an_update_is_never_counted_twice(tmp_path: Path) -> None:
    model = fit(tmp_path, whole())
    file = read(tmp_path / "last.ckpt")
    again = plain_of(file["state_dict"])
    ll.unmerge_adapters(model)
    model.load_state_dict(file["state_dict"])
    torch.testing.assert_close(model(X), again(X))
    with pytest.raises(ll.BaseMismatchError, match="If this model is merged, load its base"):
        ll.load_adapter(again, tmp_path / "last.ckpt")
    for config in (ll.LoRAConfig(r=2), lora().config):  # another fine-tune, or a like one
        ll.inject_adapters(fresh := LitTiny(), config)
        fresh.load_state_dict(file["state_dict"], strict=False)  # on the merged model
        assert torch.equal(fresh(X), again(X)) and View(fresh).is_fresh()
    model = fit(tmp_path, whole(merge=False))
    part = {name: file["state_dict"][f"q_proj.{name}"] for name in ("weight", "bias")}
    with pytest.warns(ll.LoRAWarning, match="below trained adapters.*these count twice"):
        model.q_proj.load_state_dict(part)  # only the whole module can tell a merged layer from another base


def test_a_whole_file_is_evaluated_as_any_checkpoint(tmp_path: Path) -> None:
    model = fit(tmp_path, whole(use_dora=True))
    other = LitTiny()
    nn.init.ones_(other.embed.weight)  # not its base: it need not be there
    tested = outcome(trainer(tmp_path, [ll.LoRACallback()]), "test", other, ckpt_path=tmp_path / "last.ckpt")
    torch.testing.assert_close(tested, outcome(trainer(tmp_path), "test", model))
    assert same(state(other), state(model))


class Renames(LitTiny):  # whose own state dict has other names
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {f"mine.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}


def test_a_run_goes_on_in_a_module_with_the_merged_weights_of_its_file(tmp_path: Path, caplog: Any) -> None:
    unbroken = fit(tmp_path / "a", whole(init="pissa"))
    fit(tmp_path / "b", whole(init="pissa"), max_epochs=1)
    file = tmp_path / "b" / "last.ckpt"
    for save in ("adapters", "model"):
        built, again = LitTiny.load_from_checkpoint(file), tmp_path / save / "last.ckpt"
        model = fit(tmp_path / save, lora(init="pissa", save=save), model=built, ckpt_path=file)
        assert "holds the merged weights" in caplog.text and "up to rounding" in caplog.text
        torch.testing.assert_close(state(model), state(unbroken))
        torch.testing.assert_close(loaded(again)(X), model(X))  # on the base
        assert again.stat().st_size < 40_000
    built, other = LitTiny.load_from_checkpoint(again), LitTiny.load_from_checkpoint(again)
    tested = outcome(trainer(tmp_path, [ll.LoRACallback()]), "test", built, ckpt_path=again)
    torch.testing.assert_close(tested, outcome(trainer(tmp_path), "test", model))
    other.embed.weight.data[0, 0] += 1
    with pytest.raises(ll.BaseMismatchError):
        fit(tmp_path / "c", whole(init="pissa"), model=other, ckpt_path=again)


def test_names_of_compiled_parts_are_those_of_the_module(tmp_path: Path) -> None:
    fit(tmp_path, whole(), model=Compiled(), max_epochs=1)
    Compiled().load_state_dict(read(tmp_path / "last.ckpt")["state_dict"])


class Tied(LitTiny):
    def __init__(self) -> None:
        super().__init__()
        self.net = TinyLM()


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
def test_what_could_not_be_read_rightly_is_refused(tmp_path: Path, make: Any, arguments: Any, match: str) -> None:
    with pytest.raises(ll.ConfigError, match=f"save='model' is not possible.*{match}.*Or set save='adapters'"):
        fits.fit(tmp_path, ll.LoRACallback(r=2, save="model", **arguments), model=make())
    with pytest.raises(ll.ConfigError, match="save='all' is not valid"):
        ll.LoRACallback(save="all")  # type: ignore[arg-type]


def test_rounding_of_much_of_an_update_is_said_once(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        fit(tmp_path, whole(merge=False), model=LitTiny(lr=1e-4), precision="bf16-true")
    assert [str(w.message)[:20] for w in caught if w.category is ll.MergePrecisionWarning] == ['With save="model", f']

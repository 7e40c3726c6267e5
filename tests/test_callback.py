"""One line in a Trainer fine-tunes and merges."""

import copy
import logging
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    LambdaCallback,
    ModelCheckpoint,
    ModelPruning,
    RichProgressBar,
)
from torch import nn

import lightning_lora as ll
from lightning_lora.given_arguments import defaults_of
from lightning_lora.layers import LoRALayer
from tests.support.cases import At, StopError, stop, tensors
from tests.support.compared import assert_all_have_moved
from tests.support.faults import unchanged
from tests.support.fits import beside, either_order
from tests.support.models import (
    ADAPTERS,
    TRAINED,
    LitTiny,
    X,
    best,
    data,
    is_plain,
    lora,
    same,
    state,
    trainer,
)
from tests.support.parameters import (
    attributes_of_adapters,
    flags_of,
    grads_of,
    names_of_parameters,
    names_that_differ,
    trainable_names,
)


def test_after_fit_the_module_is_plain_and_computes_as_adapted(
    tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    adapted = LitTiny()
    merged = LitTiny()
    keys = list(merged.state_dict())
    flags = flags_of(merged)
    for model, merge in ((adapted, False), (merged, "last")):
        torch.manual_seed(5)
        trainer(tmp_path, [lora(merge=merge)]).fit(model, data())
    assert is_plain(merged)
    assert type(merged.q_proj) is nn.Linear
    assert "merged the last adapters into 2 layers. The model is plain" in caplog.text
    assert "again, and remembers them: the next fit goes on with them." in caplog.text
    assert list(merged.state_dict()) == keys
    assert flags_of(merged) == flags
    torch.testing.assert_close(merged(X), adapted(X))
    assert not torch.equal(merged(X), LitTiny()(X))
    assert_all_have_moved(adapted, ADAPTERS)
    assert names_that_differ(state(LitTiny()), state(adapted)) == [
        "head.weight",
        "head.bias",
    ]


def test_a_model_as_first_argument_is_answered() -> None:
    with pytest.raises(ll.ConfigError, match=r"takes no model, and got a LitTiny.*fit"):
        ll.LoRACallback(LitTiny(), r=8)  # type: ignore[arg-type,misc]  # on purpose


# a step by hand would add to it
def test_after_fit_no_gradient_is_left(tmp_path: Path) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora(merge=False)], max_epochs=1).fit(model, data())
    assert set(grads_of(model.parameters())) == {None}


# Lightning gives it some
def test_after_fit_the_callback_keeps_no_method_of_the_module(tmp_path: Path) -> None:
    callback = lora()
    trainer(tmp_path, [callback], max_epochs=1).fit(LitTiny(), data())
    assert vars(callback).keys().isdisjoint(["log", "log_dict"])


def set_rate(t: L.Trainer, _: Any) -> None:
    """Write a rate as a tuner does: of the module's own group."""
    t.optimizers[0].param_groups[0]["lr"] = 0.003


def test_the_table_shows_ten_times_the_rate_that_a_tuner_has_written(
    tmp_path: Path, capsys: Any
) -> None:
    tuner = LambdaCallback(on_fit_start=set_rate)
    callbacks = [tuner, lora(lr_scale=10)]
    trainer(tmp_path, callbacks, max_epochs=1, enable_model_summary=True).fit(
        LitTiny(), data()
    )
    assert "0.03" in capsys.readouterr().out


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def is_shown(bar: RichProgressBar) -> bool:
    return bar.progress is not None and bar.progress.live.is_started


class Lines:
    """Each line of a log, and whether the bar was shown then: rich writes over what others write below it."""

    def __init__(self, bar: RichProgressBar) -> None:
        self.bar = bar
        self.lines: list[tuple[str, bool]] = []

    def filter(self, record: logging.LogRecord) -> bool:
        self.lines.append((record.getMessage(), is_shown(self.bar)))
        return True

    def shown_at(self, text: str) -> list[bool]:
        """Whether the bar was shown, at each line with this text."""
        return [shown for line, shown in self.lines if text in line]


def test_the_last_line_of_a_fit_comes_below_the_bar(
    tmp_path: Path, caplog: Any
) -> None:
    bar = RichProgressBar()
    lines = Lines(bar)
    caplog.handler.addFilter(lines)
    trainer(tmp_path, [lora(), bar], enable_progress_bar=True).fit(LitTiny(), data())
    assert lines.shown_at("merged the last") == [False]
    assert lines.shown_at("Interrupted after") == []
    assert True in lines.shown_at("")


def test_the_last_line_of_an_interrupted_fit_comes_below_the_bar(
    tmp_path: Path, caplog: Any
) -> None:
    bar = RichProgressBar()
    lines = Lines(bar)
    caplog.handler.addFilter(lines)
    stops = LambdaCallback(on_train_batch_end=interrupt)
    with pytest.raises(SystemExit):
        trainer(tmp_path, [lora(), bar, stops], enable_progress_bar=True).fit(
            LitTiny(), data()
        )
    assert lines.shown_at("Interrupted after") == [False]
    assert lines.shown_at("merged the last") == []


def test_an_evaluation_without_adapters_says_so(tmp_path: Path, caplog: Any) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora(merge=False)]).test(model, data(), verbose=False)
    assert "LitTiny has no adapters, and no ckpt_path was given" in caplog.text
    assert is_plain(model)
    caplog.clear()
    t = trainer(tmp_path, [lora(merge=False), best(tmp_path)])
    t.fit(model, data(), data())
    t.test(LitTiny(), data(), ckpt_path="best", verbose=False)
    t.test(model, data(), verbose=False)
    assert "no ckpt_path" not in caplog.text


def test_an_evaluation_that_merges_a_file_says_so(tmp_path: Path, caplog: Any) -> None:
    model = LitTiny()
    said = (
        "LoRA: merged the checkpoint's adapters. LitTiny is plain again, and keeps "
        "these weights."
    )
    t = trainer(tmp_path, [lora(), best(tmp_path)])
    t.fit(model, data(), data())
    t.test(model, data(), verbose=False)
    assert said not in caplog.text
    t.test(model, data(), ckpt_path="best", verbose=False)
    assert said in caplog.text
    assert is_plain(model)
    caplog.clear()
    # which is merged then
    trainer(tmp_path / "y", [lora(name="y")]).fit(model, data(), data())
    file = t.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    trainer(tmp_path, [lora(name="default")]).test(
        model, data(), ckpt_path=file, verbose=False
    )
    assert said not in caplog.text
    assert is_plain(model)


@pytest.mark.parametrize(("lr_scale", "is_told"), [(1, True), (5, False)])
def test_a_low_rate_is_told_where_all_arguments_are_given_and_none_scales(
    tmp_path: Path, caplog: Any, lr_scale: int, is_told: bool
) -> None:
    arguments = {
        **defaults_of(ll.LoRACallback),
        "lr_scale": lr_scale,
    }  # as LightningCLI
    trainer(tmp_path, [ll.LoRACallback(**arguments)]).fit(LitTiny(lr=1e-5), data())
    assert ("as in full fine-tuning" in caplog.text) == is_told


def test_a_second_fit_says_that_it_goes_on(tmp_path: Path, caplog: Any) -> None:
    model = LitTiny()
    said = "LoRACallback goes on with the adapters of LitTiny."
    t = trainer(tmp_path, [lora(), best(tmp_path)])
    t.fit(model, data(), data())
    trainer(tmp_path, [lora()]).fit(
        LitTiny(), data(), ckpt_path=t.checkpoint_callback.best_model_path
    )  # type: ignore[union-attr]
    assert said not in caplog.text
    trainer(tmp_path, [lora()]).fit(model, data())
    assert said in caplog.text


def test_nothing_to_adapt_is_an_error_and_never_a_full_fine_tune(
    tmp_path: Path,
) -> None:
    model = LitTiny()
    model.q_proj = model.v_proj = model.head = nn.Identity()  # type: ignore[assignment]
    with unchanged(model), pytest.raises(ll.TargetError, match="LitTiny"):
        trainer(tmp_path, [ll.LoRACallback(r=1)]).fit(model, data())
    with pytest.raises(ll.TargetError, match="'q_proj'"):
        trainer(tmp_path, [ll.LoRACallback(r=1, target_modules=["q_porj"])]).fit(
            LitTiny(), data()
        )


@pytest.mark.parametrize(
    "hook",
    ["on_fit_start", "on_train_start", "on_train_batch_start", "on_train_epoch_end"],
)
def test_a_callback_that_comes_when_a_fit_has_begun_is_refused(
    tmp_path: Path, hook: str
) -> None:
    model = LitTiny()
    late = LambdaCallback(
        **{hook: lambda trainer, *_: trainer.callbacks.append(lora())}
    )  # type: ignore[arg-type]
    with pytest.raises(ll.ConfigError, match="whose fit had begun"):
        trainer(tmp_path, [late], max_epochs=1).fit(model, data())
    assert is_plain(model)
    assert hook == "on_train_epoch_end" or same(state(model), state(LitTiny()))


@pytest.mark.parametrize(
    "kinds", [[ll.LoRACallback], [ll.LoRACallback(), ll.LoRAMonitor]]
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_class_among_the_callbacks_is_named_with_what_to_write(
    tmp_path: Path, kinds: Any, stage: str
) -> None:
    t = trainer(tmp_path, kinds)
    with pytest.raises(
        ll.ConfigError,
        match=r"has the class (\w+) among its callbacks.* Write \1\(\), with",
    ):
        getattr(t, stage)(LitTiny(), data())


def test_a_configuration_in_place_of_the_arguments_is_told_to_pass_these() -> None:
    with pytest.raises(
        ll.ConfigError, match="config: pass its arguments themselves, such as r=8"
    ):
        ll.LoRACallback(config=ll.LoRAConfig())  # type: ignore[call-arg]


def test_a_file_of_another_run_is_named_where_lightning_has_found_it(
    tmp_path: Path,
) -> None:
    def fit(**arguments: Any) -> None:
        saves = ModelCheckpoint(tmp_path / "runs", save_last=True)
        trainer(tmp_path, [ll.LoRACallback(r=2, **arguments), saves]).fit(
            LitTiny(), data(), ckpt_path="last"
        )

    fit()
    with pytest.raises(
        ll.AdapterMismatchError,
        match=r"last\.ckpt: .* not \['head'\]\. If another run wrote this file, pass",
    ):
        fit(modules_to_save=["head"])


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ll.ConfigError, match="2 LoRACallbacks"):
        trainer(tmp_path, [lora(), lora()]).fit(LitTiny(), data())


def test_merge_best_without_a_file_merges_the_last_adapters_and_says_so(
    tmp_path: Path,
) -> None:
    model = LitTiny()
    with pytest.warns(ll.BestCheckpointWarning):
        trainer(tmp_path, [lora(merge="best"), best(tmp_path, save_top_k=0)]).fit(
            model, data(), data()
        )
    assert is_plain(model)


def test_merge_best_whose_file_was_removed_merges_the_last_adapters_and_says_so(
    tmp_path: Path,
) -> None:
    def remove_files(*_: Any) -> None:
        for path in tmp_path.glob("*.ckpt"):
            path.unlink()

    model = LitTiny(lr=0)  # so that no later file is better
    with pytest.warns(ll.BestCheckpointWarning):
        trainer(
            tmp_path, [lora(merge="best"), best(tmp_path), At(7, remove_files)]
        ).fit(model, data(), data())
    assert is_plain(model)


def test_no_merge_in_a_fast_dev_run_after_an_exception_or_if_not_wanted(
    tmp_path: Path,
) -> None:
    trial = {"fast_dev_run": 2}
    assert_is_not_merged(fitted([lora()], tmp_path, trial))
    assert_is_not_merged(fitted([lora(merge="best"), best(tmp_path)], tmp_path, trial))
    assert_is_not_merged(fitted([lora(merge=False)], tmp_path, {}))
    assert_is_not_merged(fitted([lora(), At(2, stop)], tmp_path, {}))


def test_a_fast_dev_run_says_that_it_merges_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        fitted([lora()], tmp_path, {"fast_dev_run": True})
        assert "fast_dev_run merges nothing. The adapters stay" in caplog.text
        caplog.clear()
        fitted([lora(merge=False)], tmp_path, {"fast_dev_run": True})
    assert "merges nothing" not in caplog.text


def fitted(
    callbacks: list[L.Callback], folder: Path, options: dict[str, Any]
) -> LitTiny:
    model = LitTiny()
    with suppress(StopError):
        trainer(folder, callbacks, **options).fit(model, data(), data())
    return model


def assert_is_not_merged(model: LitTiny) -> None:
    assert isinstance(model.q_proj, LoRALayer)
    assert model.get_parameter("q_proj.lora_B").any()
    assert torch.equal(model.q_proj.weight, LitTiny().q_proj.weight)


def test_an_embedding_that_rescales_itself_does_not_count_as_changed(
    tmp_path: Path,
) -> None:
    model = LitTiny()
    again = LitTiny()
    checkpoint = best(tmp_path)
    model.embed.max_norm = again.embed.max_norm = 0.5
    trainer(tmp_path, [lora(merge="best"), checkpoint]).fit(model, data(), data())
    ll.load_adapter(again, checkpoint.best_model_path)
    torch.testing.assert_close(again(X), model(X))


def test_another_configuration_on_a_merged_model_is_refused_and_leaves_it_merged(
    tmp_path: Path,
) -> None:
    model = LitTiny()
    trainer(tmp_path, [lora()]).fit(model, data())
    output = model(X)
    with pytest.raises(ll.AdapterMismatchError, match="build the model again"):
        trainer(tmp_path, [lora(r=4)]).fit(model, data())
    assert is_plain(model)
    assert torch.equal(model(X), output)
    ll.remove_adapters(model)
    assert attributes_of_adapters(model) == []
    assert torch.equal(model(X), output)
    trainer(tmp_path, [lora(r=4)]).fit(model, data())
    assert is_plain(model)
    assert not torch.equal(model(X), output)


def test_the_callback_can_be_saved_in_the_middle_of_fit_and_is_its_arguments_alone(
    tmp_path: Path,
) -> None:
    """As a module saves it that has its callbacks among its hyperparameters."""
    callback = lora(merge=False, alpha=3)
    file = tmp_path / "callback.pt"
    save = At(2, lambda t, m: torch.save({"callbacks": [callback]}, file))
    trainer(tmp_path, [callback, save], max_epochs=1).fit(LitTiny(), data())
    assert file.stat().st_size < 3000
    with torch.serialization.safe_globals([ll.LoRACallback]):
        (loaded,) = torch.load(file, weights_only=True)["callbacks"]
    assert (loaded.config, loaded.merge, loaded.given) == (
        callback.config,
        False,
        callback.given,
    )
    model = LitTiny()
    trainer(tmp_path, [loaded], max_epochs=1).fit(model, data())
    assert model.q_proj.lora_B.any()


def test_a_callback_that_an_earlier_version_pickled_has_the_default_of_each_later_argument() -> (
    None
):
    state = lora(merge=False, lr_scale=10).__getstate__()
    del state["lr_scale"]
    loaded = ll.LoRACallback.__new__(ll.LoRACallback)
    loaded.__setstate__(state)
    assert loaded.lr_scale == 1
    assert repr(loaded) == repr(lora(merge=False))


def test_module_can_be_copied_and_pickled_in_the_middle_of_fit(tmp_path: Path) -> None:
    copies: list[nn.Module] = []
    take = At(
        2, lambda t, m: copies.extend([copy.deepcopy(m), pickle.loads(pickle.dumps(m))])
    )
    trainer(tmp_path, [lora(), take]).fit(LitTiny(), data())
    copy_in_memory, unpickled = copies
    assert isinstance(copy_in_memory.q_proj, LoRALayer)
    assert isinstance(unpickled.q_proj, LoRALayer)


def in_the_other_package() -> Any:
    """LitTiny, as a LightningModule of pytorch_lightning."""
    import pytorch_lightning as pl

    methods = {
        name: value
        for name, value in vars(LitTiny).items()
        if callable(value) and name != "__init__"
    }
    model: Any = type("Other", (pl.LightningModule,), methods)()
    for name, layer in LitTiny().named_children():
        model.add_module(name, layer)
    model.hparams["lr"] = 0.05
    return model


def test_the_other_lightning_package_works_alike(tmp_path: Path) -> None:
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint as OtherCheckpoint

    model = in_the_other_package()
    assert isinstance(lora(), pl.Callback)
    assert isinstance(lora(), L.Callback)
    checkpoint = OtherCheckpoint(tmp_path, monitor="val_loss")
    t = pl.Trainer(
        callbacks=[lora(merge="best"), ll.LoRAMonitor(), checkpoint], accelerator="cpu", max_epochs=2, logger=False,  # type: ignore[list-item]
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    t.fit(model, data(), data())
    assert isinstance(ll.LoRAMonitor(), pl.Callback)
    assert "lora/update_norm" in t.callback_metrics
    assert is_plain(model)
    assert sorted(tensors(checkpoint.best_model_path)) == sorted(TRAINED)
    tested = t.test(model, data(), ckpt_path="best", verbose=False)[0]["test_loss"]
    assert tested == pytest.approx(checkpoint.best_model_score.item())  # type: ignore[union-attr]


@pytest.mark.parametrize("trial", [False, 2])
def test_a_fast_dev_run_refuses_a_best_file_that_a_fit_would_not_find(
    tmp_path: Path, trial: Any
) -> None:
    for others in ([], [ModelCheckpoint(tmp_path)]):
        model = LitTiny()
        with unchanged(model), pytest.raises(ll.ConfigError, match="with a monitor"):
            trainer(tmp_path, [lora(merge="best"), *others], fast_dev_run=trial).fit(
                model, data(), data()
            )


@pytest.mark.parametrize(
    "make", [lambda: BackboneFinetuning(1), lambda: ModelPruning("l1_unstructured")]
)
@either_order
def test_callbacks_that_change_the_base_are_refused(
    tmp_path: Path, make: Any, first: bool
) -> None:
    model = LitTiny()
    model.backbone = model.q_proj
    before = state(model)
    other = make()
    with pytest.raises(ll.ConfigError, match=type(other).__name__):
        trainer(tmp_path, beside(other, first)).fit(model, data(), data())
    assert is_plain(model)
    assert same(state(model), before)
    assert attributes_of_adapters(model) == []
    if not first:  # listed first, it has frozen its part already
        assert trainable_names(model) == names_of_parameters(model)


class Switches(L.Callback):
    """Shows another adapter for the validation, and may set the trained one back."""

    def __init__(self, *, sets_back: bool) -> None:
        self.sets_back = sets_back

    def on_validation_epoch_start(self, trainer: L.Trainer, model: Any) -> None:
        ll.set_adapter(model, "reference")

    def on_validation_epoch_end(self, trainer: L.Trainer, model: Any) -> None:
        if self.sets_back:
            ll.set_adapter(model, "new")


@pytest.mark.parametrize("epochs", [1, 2])
def test_another_adapter_that_a_hook_left_active_is_neither_trained_nor_merged(
    tmp_path: Path, epochs: int
) -> None:
    def trainer_that_switches(*, sets_back: bool) -> L.Trainer:
        callbacks = [lora(name="new"), Switches(sets_back=sets_back)]
        options = {"max_epochs": epochs, "num_sanity_val_steps": 0}
        return trainer(tmp_path, callbacks, **options)

    model = LitTiny()
    ll.inject_adapters(model, ll.LoRAConfig(r=2), name="reference")
    t = trainer_that_switches(sets_back=False)
    with pytest.raises(
        ll.AdapterStateError, match=r"'reference' became .* that trains 'new'"
    ):
        t.fit(model, data(), data())
    assert t.global_step == len(data())  # not one of the second epoch
    again = LitTiny()
    ll.inject_adapters(again, ll.LoRAConfig(r=2), name="reference")
    trainer_that_switches(sets_back=True).fit(again, data(), data())
    assert is_plain(again)

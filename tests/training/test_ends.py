"""How a fit ends that has nothing left to train, never had anything, or is interrupted."""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_lora as ll
from lightning_lora.model.records import find_record
from lightning_lora.training import merging
from tests.support.cases import At, StopError, stop
from tests.support.compared import assert_same_tensors
from tests.support.models import LitTiny, X, data, is_plain, lora, state, trainer
from tests.support.parameters import trainable_names

FORKED: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}
NO_BATCHES: dict[str, Any] = {"limit_train_batches": 0}


def started(start: str) -> LitTiny:
    """A plain model; or with an adapter that is active, is so beside another one, is off, or is merged."""
    torch.manual_seed(3)  # the same adapters each time
    model = LitTiny()
    if start == "plain":
        return model
    ll.inject_adapters(model, lora().config, name="a")
    nn.init.ones_(model.get_parameter("q_proj.lora_B"))
    if start == "rests":
        ll.inject_adapters(model, lora(init="gaussian").config, name="b")
        ll.set_adapter(model, "a")
    elif start == "base":
        ll.set_adapter(model, None)
    elif start == "merged":
        ll.merge_adapters(model)
    return model


def about(model: LitTiny) -> tuple[Any, ...]:
    """What a model is: its adapters, what of them is shown, its classes, and what trains."""
    shown = None
    record = find_record(model)
    if record is not None:
        shown = (record.name_in_effect, record.state.is_merged)
    return ll.adapters(model), shown, is_plain(model), trainable_names(model)


def all_values(model: LitTiny) -> dict[str, Tensor]:
    """The base's and all adapters' values; the model ends un-merged."""
    ll.unmerge_adapters(model)
    values = {}
    for name in ll.adapters(model):
        with ll.set_adapter(model, name):
            for key, value in state(model).items():
                values[f"{name}: {key}"] = value
    return values


# Runs that have nothing left to train


@pytest.mark.parametrize(
    ("start", "arguments", "options"),
    [
        ("plain", {}, {}),
        ("plain", {"merge": "best", "save": "model"}, {}),
        ("plain", {"save": "model"}, FORKED),
        ("adapted", {"name": "b", "merge": False}, {}),
        ("rests", {"name": "b", "merge": "best", "save": "model"}, {}),
        ("base", {"merge": False, "save": "model"}, {}),
        ("merged", {"name": "b"}, {}),
        ("merged", {"name": "b", "merge": False}, {}),
        ("merged", {"name": "b"}, FORKED),
    ],
)
def test_a_finished_run_that_is_run_again_ends_as_it_did(
    tmp_path: Path, start: str, arguments: Any, options: Any
) -> None:
    def run(model: LitTiny, path: Path | None = None, **until: int) -> LitTiny:
        saves = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
        t = trainer(tmp_path, [lora(**arguments), saves], **options, **until)
        t.fit(model, data(), data(), ckpt_path=path)
        return model

    file = tmp_path / "last.ckpt"
    steps = 4 if options is FORKED else 8
    finished = run(started(start), max_epochs=2)
    before = about(finished)
    output = finished(X)
    again = run(started(start), file, max_epochs=2)
    until_a_step = run(started(start), file, max_epochs=9, max_steps=steps)
    run(finished, file, max_epochs=2)
    for model in (again, until_a_step, finished):
        assert about(model) == before
        assert torch.equal(model(X), output)
    values = all_values(finished)
    assert_same_tensors(all_values(again), values)
    assert_same_tensors(all_values(until_a_step), values)


@pytest.mark.parametrize(
    ("start", "arguments", "options"),
    [
        ("plain", {"merge": "last"}, {"max_epochs": 0}),
        ("plain", {"merge": False}, {"max_steps": 0}),
        ("plain", {"name": "b"}, NO_BATCHES),
        ("adapted", {"name": "b"}, NO_BATCHES),
        ("rests", {"name": "b"}, NO_BATCHES),
        ("base", {"name": "b"}, NO_BATCHES),
        ("merged", {"name": "b"}, NO_BATCHES),
        ("base", {}, NO_BATCHES),
        ("merged", {"save": "model"}, NO_BATCHES | FORKED),
    ],
)
def test_a_fit_of_no_batches_gives_the_module_back_as_it_came(
    tmp_path: Path,
    start: str,
    arguments: Any,
    options: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = started(start)
    before = about(model)
    values = state(model)
    trainer(tmp_path, [lora(**arguments)], **options).fit(model, data(), data())
    assert about(model) == before
    assert_same_tensors(state(model), values)
    if "devices" not in options:  # those of other processes are not caught
        assert (
            "This fit trained nothing: LitTiny stays as it was before." in caplog.text
        )
        assert "merged" not in caplog.text


class ReadsNothing(L.Callback):
    """The second process reads no file of adapters, as if each machine had a disk of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1:
            missing = FileNotFoundError("no such file")
            merging.read_adapter_file = Mock(side_effect=missing)  # type: ignore[attr-defined]

    def teardown(
        self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str
    ) -> None:
        torch.save(state(pl_module), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.processes
# in the other processes
@pytest.mark.filterwarnings("ignore::lightning_lora.BestCheckpointWarning")
def test_all_processes_merge_the_best_adapters_or_none(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # not the last
    callbacks = [lora(merge="best"), saves, ReadsNothing(tmp_path)]
    trainer(tmp_path, callbacks, **FORKED).fit(LitTiny(), data(), data())
    first = torch.load(tmp_path / "0.pt", weights_only=True)
    second = torch.load(tmp_path / "1.pt", weights_only=True)
    assert_same_tensors(second, first)


# Interrupts


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def signals() -> Iterator[None]:
    """Give back what handles an interrupt: Lightning ignores it from the first one on."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("signals")
# an error shows itself
@pytest.mark.parametrize(("action", "times"), [(interrupt, 1), (stop, 0)])
def test_an_interrupted_fit_says_where_the_adapters_are(
    tmp_path: Path, action: Any, times: int, caplog: Any
) -> None:
    said = (
        "Interrupted after step 5: LitTiny has its adapters as trained until then. fit "
        "goes on with them; merge_ad"
    )
    model = LitTiny()
    with suppress(SystemExit, StopError):
        trainer(tmp_path, [lora(), At(5, action)]).fit(model, data(), data())
    assert caplog.text.count(said) == times
    assert not is_plain(model)


@pytest.mark.usefixtures("signals")
def test_a_fit_that_is_interrupted_before_training_gives_the_module_back(
    tmp_path: Path, caplog: Any
) -> None:
    model = LitTiny()
    model.configure_optimizers = interrupt  # type: ignore[method-assign]
    with suppress(SystemExit):
        trainer(tmp_path, [lora()]).fit(model, data(), data())
    assert is_plain(model)
    assert "Interrupted" not in caplog.text


# Modules that change their adapted layers in a fit


class Deletes(LitTiny):
    """Deletes adapted layers in its last epoch."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        features = x
        if hasattr(self, "q_proj"):
            features = features + self.q_proj(x)
        if hasattr(self, "v_proj"):
            features = features + self.v_proj(x)
        return self.head(features)

    def on_train_epoch_end(self) -> None:
        if self.current_epoch == 1:
            for name in self.names:
                delattr(self, name)


@pytest.mark.parametrize("merge", ["last", False])
def test_a_fit_that_has_lost_all_its_adapters_is_an_error_that_names_them(
    tmp_path: Path, merge: Any
) -> None:
    model = Deletes("q_proj", "v_proj")
    with pytest.raises(
        ll.AdapterStateError,
        match=r"'q_proj', 'v_proj' of Deletes had adapters .* and are gone",
    ):
        trainer(tmp_path, [lora(merge=merge)]).fit(model, data())


def test_a_fit_that_has_lost_some_of_its_adapters_names_them_and_merges_the_others(
    tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    model = Deletes("q_proj")
    with pytest.warns(
        ll.LoRAWarning, match=r"'q_proj' of Deletes had adapters .* The others stay"
    ):
        trainer(tmp_path, [lora()]).fit(model, data())
    assert is_plain(model)
    assert (
        "merged the last adapters into 1 layer. The model is plain again" in caplog.text
    )


class Merges(LitTiny):
    def on_train_end(self) -> None:
        ll.merge_adapters(self)


def test_a_fit_in_which_the_module_has_merged_itself_counts_its_layers(
    tmp_path: Path, caplog: Any
) -> None:
    caplog.set_level("INFO")
    trainer(tmp_path, [lora()]).fit(Merges(), data())
    assert "into 2 layers." in caplog.text

"""How a fit ends that has nothing left to train, never had anything, or is interrupted."""

import signal
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
from lightning_lora.model.record import find_record
from lightning_lora.training import merging
from tests.support.cases import At, StopError, stop
from tests.support.models import LitTiny, X, data, is_plain, lora, same, state, trainer

FORKED: dict[str, Any] = {"strategy": "ddp_fork", "devices": 2}
STARTS = ["plain", "adapted", "rests", "base", "merged"]


def started(start: str) -> LitTiny:
    """A plain model; or with an adapter that is active, is so beside another one, is off, or is merged."""
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
    """What a model is, and computes."""
    names, record = ll.adapters(model), find_record(model)
    shown = record and (record.shown, record.is_merged)
    return names, shown, is_plain(model), [p.requires_grad for p in model.parameters()]


def all_values(model: LitTiny) -> dict[str, Tensor]:
    """The base's and all adapters' values; the model ends un-merged."""
    ll.unmerge_adapters(model)
    values = {}
    for name in ll.adapters(model):
        with ll.set_adapter(model, name):
            values |= {f"{name}: {key}": value for key, value in state(model).items()}
    return values


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
    def run(model: LitTiny, **until: int) -> LitTiny:
        saves = ModelCheckpoint(tmp_path, monitor="val_loss", save_last=True)
        path = tmp_path / "last.ckpt"
        t = trainer(tmp_path, [lora(**arguments), saves], **(options | until))
        t.fit(model, data(), data(), ckpt_path=path if path.exists() else None)
        return model

    finished = run(started(start), max_epochs=2)
    before, output = about(finished), finished(X)
    limits: list[dict[str, int]] = [{"max_epochs": 2}, {"max_epochs": 9, "max_steps": 4 if options else 8}]
    for model in (*(run(started(start), **limit) for limit in limits), run(finished, max_epochs=2)):
        assert about(model) == before and torch.equal(model(X), output)
    assert same(all_values(model), all_values(finished))


NONE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("plain", {"merge": "last"}, {"max_epochs": 0}),
    ("plain", {"merge": False}, {"max_steps": 0}),
    *((start, {"name": "b"}, {"limit_train_batches": 0}) for start in STARTS),
    ("base", {}, {"limit_train_batches": 0}),
    ("merged", {"save": "model"}, {"limit_train_batches": 0, **FORKED}),
]


@pytest.mark.parametrize(("start", "arguments", "options"), NONE)
def test_a_fit_of_no_batches_gives_the_module_back_as_it_came(
    tmp_path: Path, start: str, arguments: Any, options: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = started(start)
    before, values = about(model), state(model)
    trainer(tmp_path, [lora(**arguments)], **options).fit(model, data(), data())
    assert about(model) == before and same(state(model), values)
    if "devices" not in options:  # those of other processes are not caught
        assert "This fit trained nothing: LitTiny stays as it was before." in caplog.text
        assert "merged" not in caplog.text


class ReadsNothing(L.Callback):
    """The second process reads no file of adapters, as if each machine had a disk of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank:
            merging.read_adapter_file = Mock(side_effect=FileNotFoundError("no such file"))  # type: ignore[attr-defined]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.save(state(pl_module), self.folder / f"{trainer.global_rank}.pt")


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore::lightning_lora.BestCheckpointWarning")  # in the other processes
def test_all_processes_merge_the_best_adapters_or_none(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")  # not the last
    callbacks = [lora(merge="best"), saves, ReadsNothing(tmp_path)]
    trainer(tmp_path, callbacks, **FORKED).fit(LitTiny(), data(), data())
    assert same(*(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)))


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_fit_says_where_the_adapters_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = "Interrupted after step 5: LitTiny has its adapters as trained until then. fit goes on with them; merge_ad"
    before = signal.getsignal(signal.SIGINT)  # Lightning ignores it from the first one on
    for action, expected in ((interrupt, 1), (stop, 0)):  # an error shows itself
        caplog.clear()
        model = LitTiny()
        with suppress(SystemExit, StopError):
            trainer(tmp_path, [lora(), At(5, action)]).fit(model, data(), data())
        assert caplog.text.count(said) == expected and not is_plain(model)
    caplog.clear()
    plain = LitTiny()
    plain.configure_optimizers = interrupt  # type: ignore[method-assign]  # before training: it is as it came
    with suppress(SystemExit):
        trainer(tmp_path, [lora()]).fit(plain, data(), data())
    assert is_plain(plain) and "Interrupted" not in caplog.text
    signal.signal(signal.SIGINT, before)


class Deletes(LitTiny):  # adapted layers, in its last epoch
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def forward(self, index: Tensor) -> Tensor:
        x = self.embed(index)
        return self.head(sum((getattr(self, name)(x) for name in ("q_proj", "v_proj") if hasattr(self, name)), x))

    def on_train_epoch_end(self) -> None:
        for name in self.names if self.current_epoch == 1 else ():
            delattr(self, name)


@pytest.mark.parametrize("merge", ["last", False])
def test_a_fit_that_has_lost_all_its_adapters_is_an_error_that_names_them(tmp_path: Path, merge: Any) -> None:
    with pytest.raises(ll.AdapterStateError, match=r"'q_proj', 'v_proj' of Deletes had adapters .* and are gone"):
        trainer(tmp_path, [lora(merge=merge)]).fit(Deletes("q_proj", "v_proj"), data())


def test_a_fit_that_has_lost_some_of_its_adapters_names_them_and_merges_the_others(tmp_path: Path, caplog: Any) -> None:
    with (
        pytest.warns(ll.LoRAWarning, match=r"'q_proj' of Deletes had adapters .* The others stay"),
        caplog.at_level("INFO"),
    ):
        trainer(tmp_path, [lora()]).fit(model := Deletes("q_proj"), data())
    assert is_plain(model) and "merged the last adapters into 1 layer." in caplog.text


def test_a_fit_in_which_the_module_has_merged_itself_counts_its_layers(tmp_path: Path, caplog: Any) -> None:
    class Merges(LitTiny):
        def on_train_end(self) -> None:
            ll.merge_adapters(self)

    with caplog.at_level("INFO"):
        trainer(tmp_path, [lora()]).fit(Merges(), data())
    assert "into 2 layers." in caplog.text

"""A run's loggers show how its adapters were trained."""

from inspect import signature
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_lora import LoRACallback, LoRAWarning, inject_adapters, summarize
from tests.support.models import LitTiny, data, lora, trainer
from tests.support.training import Notes, adapted

ARGUMENTS: dict[str, Any] = {
    "lora/r": 2,
    "lora/alpha": 2,
    "lora/dropout": 0.0,
    "lora/target_modules": "all-linear",
    "lora/modules_to_save": '["head"]',
    "lora/bias": "none",
    "lora/init": "kaiming",
    "lora/use_rslora": False,
    "lora/use_dora": False,
    "lora/autocast_adapter_dtype": True,
    "lora/merge": "last",
    "lora/save": "adapters",
    "lora/trained_share": summarize(adapted()).share,
}


def fit(folder: Path, model: L.LightningModule, logger: Any, callback: LoRACallback | None = None) -> L.Trainer:
    t = trainer(folder, [callback or lora()], logger=logger, log_every_n_steps=1, max_epochs=1)
    t.fit(model, data())
    return t


def test_a_logger_gets_the_arguments_the_share_and_the_base(tmp_path: Path) -> None:
    notes = Notes()
    fit(tmp_path, LitTiny(), notes)
    (found,) = notes.ours
    base = found.pop("lora/base")
    assert found == ARGUMENTS and len(base) == 16 and int(base, 16)
    assert [each for each in notes.seen if "lora/r" not in each] == [{"width": 8, "lr": 0.05}]


def test_patterns_and_lists_are_text(tmp_path: Path) -> None:
    notes, options = Notes(), {"alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {r"q_\w+": 1}, "merge": False}
    fit(tmp_path, LitTiny(), notes, lora(**options))
    (found,) = notes.ours
    assert found["lora/target_modules"] == '["q_proj"]' and found["lora/rank_pattern"] == r'{"q_\\w+": 1}'
    assert found["lora/alpha"] == 4 and found["lora/merge"] is False
    assert all(isinstance(value, bool | int | float | str) for value in found.values())


def test_the_base_is_told_apart(tmp_path: Path) -> None:
    bases = []
    for change in (0.0, 0.0, 1.0):
        model, notes = LitTiny(), Notes()
        model.embed.weight.data += change
        fit(tmp_path, model, notes, lora(r=1 + len(bases)))
        bases.append(notes.ours[0]["lora/base"])
    assert bases[0] == bases[1] != bases[2]


def test_a_resumed_run_and_a_second_fit_say_the_same(tmp_path: Path) -> None:
    notes, model = Notes(), LitTiny()
    t = fit(tmp_path, model, notes)
    t.save_checkpoint(tmp_path / "a.ckpt")
    fit(tmp_path, model, notes)
    t = trainer(tmp_path, [LoRACallback()], logger=notes, log_every_n_steps=1)
    t.fit(LitTiny(), data(), ckpt_path=tmp_path / "a.ckpt")  # it takes its arguments from the file
    assert len(notes.ours) == 3 and notes.ours[0] == notes.ours[1] == notes.ours[2]


def test_a_logger_that_refuses_is_named_and_the_fit_goes_on(tmp_path: Path) -> None:
    notes = Notes()
    fit(tmp_path, LitTiny(), notes)
    with pytest.warns(LoRAWarning, match=r"Notes did not take .*'lora/r'.* cannot be changed"):
        t = fit(tmp_path, LitTiny(), notes, lora(r=1))
    assert t.global_step == 4 and len(notes.ours) == 1


def test_nothing_is_logged_where_the_user_wants_none(tmp_path: Path) -> None:
    notes = Notes()
    choices: list[dict[str, Any]] = [{"logger": False}, {"logger": notes, "fast_dev_run": 1}]
    if "enable_autolog_hparams" in signature(L.Trainer).parameters:
        choices.append({"logger": notes, "enable_autolog_hparams": False})
    for options in choices:
        trainer(tmp_path, [lora()], **{"max_steps": 1, "log_every_n_steps": 1, **options}).fit(LitTiny(), data())
    trainer(tmp_path, [lora()], logger=notes).test(LitTiny(), data(), verbose=False)
    assert not notes.ours


class Counts(L.Callback):
    """Looks at what each process has logged."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert len(trainer.logger.ours) == (1 if trainer.is_global_zero else 0)  # type: ignore[union-attr]


@pytest.mark.processes
def test_one_process_logs(tmp_path: Path) -> None:
    t = trainer(tmp_path, [lora(), Counts()], logger=Notes(), strategy="ddp_fork", devices=2, log_every_n_steps=1)
    t.fit(LitTiny(), data())


def test_the_users_own_hyperparameters_stay(tmp_path: Path) -> None:
    fit(tmp_path, LitTiny(lr=0.03), CSVLogger(tmp_path))
    (file,) = tmp_path.rglob("hparams.yaml")
    held = yaml.safe_load(file.read_text())
    assert held["lr"] == 0.03 and {key: held[key] for key in ARGUMENTS} == ARGUMENTS


def test_tensorboard_shows_both_in_one_row(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    fit(tmp_path, LitTiny(lr=0.03), TensorBoardLogger(tmp_path))
    (file,) = tmp_path.rglob("hparams.yaml")
    assert {"lr": 0.03, "lora/r": 2}.items() <= yaml.safe_load(file.read_text()).items()
    events = EventAccumulator(str(file.parent)).Reload()
    shown = HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    values = shown.session_start_info.hparams
    assert values["lr"].number_value == 0.03 and values["lora/r"].number_value == 2


def test_adapters_that_were_there_are_logged_as_they_are(tmp_path: Path) -> None:
    model, notes = LitTiny(), Notes()
    inject_adapters(model, lora(r=1).config)
    with torch.no_grad():
        model.q_proj.lora_B.fill_(0.1)  # type: ignore[union-attr,operator]
    fit(tmp_path, model, notes, LoRACallback())
    assert notes.ours[0]["lora/r"] == 1

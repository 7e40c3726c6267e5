"""LoRASweep: several adapters, each exactly as in a fit of its own, and the better ones go on."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import (
    ConfigError,
    LoRACallback,
    LoRASweep,
    LoRAWarning,
    TargetError,
    adapters,
    inject_adapters,
)
from tests.support.cases import StopError, same_parts
from tests.support.faults import unchanged
from tests.support.models import LitTiny, data, is_plain, same, state, trainer
from tests.support.parameters import chosen

HEAD = {"modules_to_save": ["head"]}


class Rich(LitTiny):
    """With dropout, running statistics, a metric, a schedule, results in a list, and batches that it changes."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = not manual
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(8)
        self.accuracy = MulticlassAccuracy(4)
        self.losses: list[float] = []

    def forward(self, index: Tensor) -> Tensor:
        x = self.dropout(self.norm(self.embed(index)))
        return self.head(torch.tanh(self.q_proj(x)) + self.v_proj(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        batch[0].add_(1).remainder_(20)
        loss = self.loss(batch)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.losses.append(loss.item())
        if not self.automatic_optimization:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.accuracy(self(batch[0]), batch[1])
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
                "interval": "step",
            }
        ]


def loaders(**options: Any) -> Any:
    return DataLoader(data().dataset, 4, shuffle=True, **options), data()


def fitting(
    folder: Path, build: Callable[[], Any] = Rich, *others: Any, **options: Any
) -> Any:
    """A function that fits once, and the list of all Trainers that it made."""
    made: list[Any] = []
    given = options.pop("loaders", loaders)

    def fit(callback: Any, ckpt_path: Any = None) -> None:
        callbacks = [callback]
        for make in others:
            callbacks.append(make())
        t = trainer(folder, callbacks, **{"max_epochs": 3, **options})
        made.append(t)
        t.fit(build(), *given(), ckpt_path=ckpt_path)

    return fit, made


def check_as_alone(
    sweep: LoRASweep, name: str, fit: Any, made: list[Any], file: Path
) -> Any:
    """The file of a run that reached the end is that of a fit alone: all states but random numbers, which go on."""
    L.seed_everything(3, verbose=False)
    fit(LoRACallback(**{**sweep.runs[name], "merge": False}))
    made[-1].save_checkpoint(file)
    one = torch.load(file, weights_only=True)
    other = torch.load(sweep.directory / f"{name}.ckpt", weights_only=True)
    assert one["optimizer_states"][0]["state"]
    assert one["global_step"] == other["global_step"]
    stages = ("state_dict", "optimizer_states", "lr_schedulers", "loops")
    assert same_parts(chosen(one, stages), chosen(other, stages))
    return made[-1].lightning_module


class StopsEarly(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.parametrize(
    ("build", "varied", "options"),
    [
        (
            Rich,
            {"r": [1, 2]},
            {"accumulate_grad_batches": 2, "loaders": lambda: loaders(num_workers=1)},
        ),
        (lambda: Rich(manual=True), {"init": ["kaiming", "pissa"]}, {}),
        (
            Rich,
            {"lr_scale": [1, 10], "dropout": [0.0, 0.1]},
            {"val_check_interval": 2, "gradient_clip_val": 0.1},
        ),
        (Rich, {"r": [1, 2], "keep": 1}, {"others": [StopsEarly]}),
    ],
    ids=["accumulated, workers", "manual", "validated often", "stops by itself"],
)
def test_the_best_is_as_in_a_fit_alone_to_the_bit(
    tmp_path: Path, build: Any, varied: Any, options: Any
) -> None:
    others = options.pop("others", [])
    fit, made = fitting(tmp_path, build, *others, **options)
    sweep = LoRASweep(**varied, **HEAD, directory=tmp_path / "sweep")
    L.seed_everything(3, verbose=False)
    best = sweep.run(fit)[0]["name"]
    assert not others or len(sweep.results[0]["metrics"]) == 2
    swept = made[-1].lightning_module
    assert is_plain(swept)
    alone = check_as_alone(sweep, best, fit, made, tmp_path / "alone.ckpt")
    L.seed_everything(3, verbose=False)
    fit(LoRACallback(**sweep.runs[best]))
    assert same(state(made[-1].lightning_module), state(swept))
    assert not is_plain(alone)


def test_one_module_may_be_used_for_all_and_be_evaluated_in_between(
    tmp_path: Path,
) -> None:
    model = Rich()
    fit, made = fitting(tmp_path, lambda: model)

    def fit_and_validate(callback: Any, ckpt_path: Any) -> None:
        fit(callback, ckpt_path)
        made[-1].validate(dataloaders=data(), verbose=False)

    sweep = LoRASweep(r=[1, 2], keep=1, **HEAD, directory=tmp_path / "sweep")
    base = state(model)
    L.seed_everything(3, verbose=False)
    sweep.run(fit_and_validate)
    assert is_plain(model)
    assert not same(state(model), base)
    assert [len(each["metrics"]) for each in sweep.results] == [3, 3]
    for name in sweep.runs:
        fit, made = fitting(tmp_path)
        check_as_alone(sweep, name, fit, made, tmp_path / "alone.ckpt")


def test_the_better_half_goes_on_after_each_epoch(
    tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    fit, made = fitting(tmp_path, LitTiny)
    sweep = LoRASweep(r=[1, 2], alpha=[1, 16], directory=tmp_path / "sweep")
    with caplog.at_level("INFO"):
        results = sweep.run(fit)
    assert [each["dropped"] for each in results] == [None, 2, 1, 1]
    assert [len(each["metrics"]) for each in results] == [3, 2, 1, 1]
    assert len(made) == 4 + 1 + 2 + 1 + 1
    assert results is sweep.results
    assert results[2]["metrics"] < results[3]["metrics"]
    assert (
        f"LoRASweep, epoch 2: {results[0]['name']} is best; 1 of 2 go on."
        in caplog.text
    )
    shown = capsys.readouterr().out
    assert all(
        f"{name} " in shown for name in ("Adapter", "val_loss", "Dropped", *sweep.runs)
    )
    assert {each.name for each in sweep.directory.iterdir()} == {
        f"{name}.ckpt" for name in sweep.runs
    }


class FirstIsBest(LitTiny):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", float(self.current_epoch) + 0.12345)


def test_the_table_of_many_epochs_has_the_last_values_the_best_and_the_weights(
    tmp_path: Path,
) -> None:
    fit, _ = fitting(tmp_path, FirstIsBest, max_epochs=7)
    sweep = LoRASweep(
        lr_scale=[1, 2], dropout=[0.1], r=[1, 2], keep=1, directory=tmp_path
    )
    results = sweep.run(fit)
    console = Console(width=90, file=io.StringIO())
    console.print(sweep.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "... 3.123  4.123  5.123  6.123 " in text
    assert " 0.1235 (1) " in text
    assert " lr_scale1-r2 " in text
    assert max(map(len, text.splitlines())) <= 90
    small, large = (each for each in results if each["lr_scale"] == 1)
    assert large["weights"] == 2 * small["weights"]
    assert f" {large['weights']:,} " in text
    assert (small["best"], small["best_epoch"]) == (small["metrics"][0], 1)


def test_dropped_after_says_how_many_epochs_an_adapter_has_trained(
    tmp_path: Path, caplog: Any
) -> None:
    fit, _ = fitting(tmp_path, LitTiny, max_epochs=9, check_val_every_n_epoch=3)
    sweep = LoRASweep(r=[1, 2, 4, 8], **HEAD, directory=tmp_path / "sweep")
    with caplog.at_level("INFO"):
        results = sweep.run(fit)
    assert [each["dropped"] for each in results] == [None, 6, 3, 3]
    assert "LoRASweep, epoch 3: " in caplog.text
    assert "LoRASweep, epoch 6: " in caplog.text
    trained = [
        torch.load(tmp_path / "sweep" / f"{each['name']}.ckpt", weights_only=True)[
            "epoch"
        ]
        for each in results
    ]
    assert trained[1:] == [6, 3, 3]


def test_merge_best_is_that_of_a_fit_of_the_best_alone(tmp_path: Path) -> None:
    made: list[Any] = []

    def fit(callback: Any, ckpt_path: Any = None) -> None:
        files = ModelCheckpoint(
            tmp_path / getattr(callback, "run", "alone"), monitor="val_acc", mode="max"
        )
        made.append(trainer(tmp_path, [callback, files], max_epochs=3))
        made[-1].fit(Rich(), *loaders(), ckpt_path=ckpt_path)

    sweep = LoRASweep(
        r=[1, 2],
        merge="best",
        monitor="val_acc",
        mode="max",
        directory=tmp_path / "sweep",
    )
    L.seed_everything(3, verbose=False)
    best = sweep.run(fit)[0]
    L.seed_everything(3, verbose=False)
    swept = made[-1].lightning_module
    fit(LoRACallback(**sweep.runs[best["name"]]))
    assert same(state(swept), state(made[-1].lightning_module))
    assert is_plain(swept)


def test_files_of_an_earlier_sweep_are_named_before_they_are_written_over(
    tmp_path: Path,
) -> None:
    fit, made = fitting(tmp_path, LitTiny, max_epochs=1)
    LoRASweep(r=[1, 2], directory=tmp_path / "sweep").run(fit)
    LoRASweep(r=[3, 4], directory=tmp_path / "sweep").run(fit)
    file = tmp_path / "sweep" / "r2.ckpt"
    before = file.read_bytes()
    fits = len(made)
    sweep = LoRASweep(r=[2, 5], alpha=16, directory=tmp_path / "sweep")
    says = r"writes over 1 file of an earlier sweep in .*sweep: 'r2.ckpt'\..* another directory"
    for _ in range(2):
        # the tests make errors of warnings
        with pytest.raises(LoRAWarning, match=says):
            sweep.run(fit)
    assert len(made) == fits
    assert file.read_bytes() == before
    with pytest.warns(LoRAWarning, match=says):
        sweep.run(fit)
    assert file.read_bytes() != before


def test_a_run_that_stops_by_itself_ends_and_the_others_go_on(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            trainer.should_stop = len(pl_module.q_proj.lora_A) == 1

    fit, _ = fitting(tmp_path, LitTiny, Stop, lambda: EarlyStopping("val_loss"))
    sweep = LoRASweep(r=[1, 2, 3], keep=0.9, directory=tmp_path / "sweep")
    sweep.run(fit)
    assert {each["r"]: len(each["metrics"]) for each in sweep.results} == {
        1: 1,
        2: 3,
        3: 3,
    }
    assert all(each["dropped"] is None for each in sweep.results)


def test_a_module_with_adapters_keeps_them_and_is_refused(tmp_path: Path) -> None:
    model = LitTiny()
    inject_adapters(model, LoRACallback(r=2).config, name="de")
    fit, _ = fitting(tmp_path, lambda: model)
    with pytest.raises(ConfigError, match=r"a module with adapters .*unmerge_adapters"):
        LoRASweep(r=[1, 2], directory=tmp_path).run(fit)
    assert adapters(model) == ("de",)


class Diverges(LitTiny):  # adapters of rank 1 have no loss
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        rank = len(self.q_proj.lora_A)  # type: ignore[arg-type]
        self.log("val_loss", self.loss(batch) * (torch.nan if rank == 1 else 1))


@pytest.mark.parametrize("stops", [False, True])
def test_an_adapter_without_a_number_is_last_also_if_it_stopped_by_itself(
    tmp_path: Path, stops: bool
) -> None:
    others = [lambda: EarlyStopping("val_loss")] * stops
    fit, _ = fitting(tmp_path, Diverges, *others)
    worst = LoRASweep(r=[1, 2], directory=tmp_path).run(fit)[-1]
    assert worst["r"] == 1
    assert worst["best_epoch"] is None


class DivergesLater(LitTiny):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        factor = torch.nan if self.current_epoch else 1
        self.log("val_loss", self.loss(batch) * factor)


def test_a_dropped_adapter_that_is_the_best_one_trains_no_further(
    tmp_path: Path,
) -> None:
    fit, made = fitting(tmp_path, DivergesLater)
    best = LoRASweep(r=[1, 2], merge=False, directory=tmp_path / "sweep").run(fit)[0]
    assert len(best["metrics"]) == 1
    assert best["dropped"] == 1
    assert made[-1].global_step == made[0].global_step
    assert adapters(made[-1].lightning_module) == ("default",)


def test_if_no_adapter_has_a_number_none_is_merged(tmp_path: Path) -> None:
    model = Diverges()
    with (
        unchanged(model),
        pytest.raises(ConfigError, match="val_loss is NaN for all adapters"),
    ):
        LoRASweep(r=1, alpha=[1, 2], directory=tmp_path).run(
            fitting(tmp_path, lambda: model)[0]
        )
    assert adapters(model) == ()


def all_but(number: int, fit: Any) -> Any:
    """A function that fits, but not in its n-th call: it may find its results on the disk."""
    calls = list[Any]()

    def fits(callback: Any, path: str | None) -> None:
        calls.append(callback)
        if len(calls) != number:
            fit(callback, path)

    return fits


@pytest.mark.filterwarnings("ignore:Total length of")
@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        # the path, or the callback, is forgotten
        (
            lambda folder: lambda callback, _: fitting(folder, LitTiny)[0](callback),
            {},
            r"Trainer.fit\(ckpt_path=...\)",
        ),
        (
            lambda folder: (
                lambda _, path: fitting(folder, LitTiny)[0](LoRACallback(r=1), path)
            ),
            {},
            "makes a Trainer with the callback that it gets, and fits. No fit of r1",
        ),
        (
            lambda folder: all_but(5, fitting(folder, LitTiny)[0]),
            {},
            r"fits in each call: the last .*r\d\.ckpt",
        ),
        (
            lambda folder: all_but(2, fitting(folder, LitTiny)[0]),
            {},
            r"fits in each call: the second .*r1\.ckpt",
        ),
        (
            lambda folder: fitting(folder, LitTiny, limit_val_batches=0)[0],
            {},
            "this fit has none: limit_val_batches=0. Expected",
        ),
        (
            lambda folder: fitting(folder, LitTiny, check_val_every_n_epoch=4)[0],
            {},
            "has none: check_val_every_n_epoch=4 and max_epochs=3. Expected",
        ),
        (
            lambda folder: fitting(folder, loaders=lambda: [data()])[0],
            {},
            "has none: no validation_step, or no val_dataloader. Expected",
        ),
        (
            lambda folder: fitting(folder, loaders=lambda: [data(), []])[0],
            {},
            "The fit of r1 has ended without a validation",
        ),
        (
            lambda folder: fitting(folder, max_steps=9)[0],
            {},
            "does not work with max_steps",
        ),
        (
            lambda folder: fitting(
                folder, Rich, lambda: StochasticWeightAveraging(0.1)
            )[0],
            {},
            "that average weights",
        ),
        (
            lambda folder: fitting(folder, reload_dataloaders_every_n_epochs=1)[0],
            {},
            "with reload_dataloaders",
        ),
        (
            lambda folder: fitting(folder)[0],
            {"monitor": "val_los_"},
            "'val_los_' is not logged .* Logged: .*'val_loss'.* Give one of these",
        ),
    ],
)
def test_what_does_not_work_is_named(
    tmp_path: Path, build: Any, arguments: Any, message: str
) -> None:
    sweep = LoRASweep(r=[1, 2], mode="min", directory=tmp_path / "sweep", **arguments)
    with pytest.raises(ConfigError, match=message):
        sweep.run(build(tmp_path))


@pytest.mark.parametrize(
    ("keep", "forgets"), [(0.5, 2), (1, 2), (0.5, 4), (0.5, 5), (1, 4)]
)
def test_a_forgotten_path_is_said_before_anything_else_trains(
    tmp_path: Path, keep: float, forgets: int
) -> None:
    model = LitTiny()
    base = state(model)
    fit, made = fitting(tmp_path, lambda: model)
    calls = list[str]()

    def fit_without_path(callback: Any, path: str | None) -> None:
        calls.append(callback.run)
        fit(callback, None if len(calls) >= forgets else path)

    sweep = LoRASweep(r=[1, 2], keep=keep, directory=tmp_path / "sweep")
    with pytest.raises(ConfigError, match=r"Trainer.fit\(ckpt_path=...\)"):
        sweep.run(fit_without_path)
    assert len(made) == forgets
    assert made[-1].global_step == 0
    assert adapters(model) == ()
    assert same(state(model), base)


@pytest.mark.parametrize(
    "options", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 4}]
)
def test_a_fit_without_validation_trains_nothing(tmp_path: Path, options: Any) -> None:
    fit, made = fitting(tmp_path, LitTiny, **options)
    with pytest.raises(ConfigError, match="this fit has none"):
        LoRASweep(r=[1, 2], directory=tmp_path / "sweep").run(fit)
    assert [each.global_step for each in made] == [0]


def test_other_processes_are_refused(tmp_path: Path) -> None:
    fit, _ = fitting(tmp_path, LitTiny, strategy="ddp_fork", devices=2)
    # wrapped by torch
    with pytest.raises(
        Exception, match="does not work with strategies that fork or spawn"
    ):
        LoRASweep(r=[1, 2], directory=tmp_path / "sweep").run(fit)


def test_an_error_in_a_fit_ends_all_and_leaves_the_base(tmp_path: Path) -> None:
    class Stops(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: Any, *_: Any
        ) -> None:
            if trainer.global_step == 3 and len(pl_module.q_proj.lora_A) == 2:
                raise StopError

    model = LitTiny()
    with unchanged(model), pytest.raises(StopError):
        LoRASweep(r=[1, 2], directory=tmp_path).run(
            fitting(tmp_path, lambda: model, Stops)[0]
        )
    assert adapters(model) == ()
    with pytest.raises(TargetError, match="q_porj"):
        LoRASweep(target_modules=[["q_porj"], ["q_proj"]], directory=tmp_path).run(
            fitting(tmp_path)[0]
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"r": 4},
            r"LoRASweep\(r=4\) .* each argument has one value. Give a list .*r=\[4, 8\]\.$",
        ),
        ({"r": [4]}, r"LoRASweep\(r=\[4\]\) .* each argument has one value"),
        ({}, r"LoRASweep\(\) .* each argument has one value"),
        ({"r": []}, r"r=\[\] is not valid. Expected a list of values"),
        ({"r": [8, 16, 16]}, "has an adapter twice: r=16. Expected each value once"),
        ({"r": [8, 16], "keep": 0}, "^keep=0 is not valid. Expected .*keep=0.5"),
        ({"r": [8, 16], "keep": "half"}, "^keep='half' is not valid"),
        ({"r": [8, 16], "mode": "least"}, "^mode='least' is not valid. Expected 'm"),
        (
            {"r": [8, 16], "monitor": "val_acc"},
            "^monitor='val_acc' is not called a loss.* Write mode='max' .*or mode='min'",
        ),
        ({"r": [8, 0]}, "r=0"),
        ({"ranks": [8, 16]}, "it is r here"),
        ({"loraplus_lr_ratio": [1, 16]}, "lr_scale={'A': 1, 'B': 16}"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            r"list of lists: target_modules=\[\['q_proj', 'v_proj'\], \[...\]\]",
        ),
    ],
)
def test_arguments_are_checked_at_once(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRASweep(**arguments)


def test_a_tuple_of_values_is_as_a_list() -> None:
    assert list(LoRASweep(r=(2, 4)).runs) == ["r2", "r4"]
    sweep = LoRASweep(target_modules=(("q_proj",), ("q_proj", "v_proj")))
    assert len(sweep.runs) == 2
    heads = [
        each["modules_to_save"]
        for each in LoRASweep(r=[2, 4], modules_to_save=("head",)).runs.values()
    ]
    assert heads == [("head",), ("head",)]


def test_names_have_what_differs() -> None:
    sweep = LoRASweep(
        lr_scale=[1.0, {"A": 10, "B": 160}],
        dropout=[0.0, 0.1],
        modules_to_save=[["head"]],
        r=[4],
    )
    scales = {
        name: LoRACallback(**arguments).lr_scale
        for name, arguments in sweep.runs.items()
    }
    assert scales["lr_scale_A_10_B_160-dropout0.1"] == {"A": 10, "B": 160}
    assert len(scales) == 4
    assert all(
        (each["r"], each["modules_to_save"]) == (4, ["head"])
        for each in sweep.runs.values()
    )
    # whose names would be the same
    sweep = LoRASweep(target_modules=["q_proj|v_proj", ["q_proj", "v_proj"]])
    assert list(sweep.runs) == [
        "target_modules_q_proj_v_proj",
        "target_modules_q_proj_v_proj_2",
    ]
    names = [f"encoder.layers.{number}.attention" for number in range(12)]
    long = [names[:11], names]
    assert all("-r" in name for name in LoRASweep(target_modules=long, r=[1, 2]).runs)
    lists = dict.fromkeys(
        ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"),
        long,
    )
    # the name of a file may have 255
    assert max(map(len, LoRASweep(**lists).runs)) < 220

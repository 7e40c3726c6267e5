"""LoRASweep: several adapters in one fit, each exactly as in a fit of its own."""

import gc
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from lightning_lora import ConfigError, LoRACallback, LoRASweep, LoRAWarning, TargetError, inject_adapters
from lightning_lora.model.state import find_record
from lightning_lora.training.randomness import RANDOM
from tests.support.cases import StopError
from tests.support.models import LitTiny, data, is_plain, lora, same, state, trainer

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
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9), "interval": "step"}
        ]


class InData(L.LightningDataModule):
    """Data that is split anew in each set-up, and changed on the way to the device."""

    loaded = 0

    def setup(self, stage: str) -> None:
        self.parts = torch.utils.data.random_split(data(24).dataset, [16, 8])

    def train_dataloader(self) -> Any:
        InData.loaded += 1
        return DataLoader(self.parts[0], 4, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], 4)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0].flip(0), batch[1].flip(0)]


class FromMain(DataLoader[Any]):
    """Its workers are forked: locks that other threads hold then would stay closed in them."""

    def __iter__(self) -> Any:
        assert threading.current_thread() is threading.main_thread()
        return super().__iter__()


def shuffled(**options: Any) -> DataLoader[Any]:
    return FromMain(data().dataset, 4, shuffle=True, **options)


def fit(
    folder: Path, callback: L.Callback, *others: L.Callback, model: Any = None, loaders: Any = None, **options: Any
) -> Any:
    """Fit with a file for each validation, and return the Trainer."""
    L.seed_everything(3, verbose=False)
    files = ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=False)
    t = trainer(folder, [callback, *others, files], **{"max_epochs": 3, **options})
    if isinstance(loaders, L.LightningDataModule):
        t.fit(model or Rich(), datamodule=loaders)
    else:
        t.fit(model or Rich(), *(loaders or (shuffled(), data())))
    return t


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places where two files differ. Paths are left out."""
    if isinstance(one, Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict | list | tuple):
        if len(one) != len(other):
            return [where]
        keys: Any = one.keys() if isinstance(one, dict) else range(len(one))
        inside = [differences(one[key], other[key], f"{where}/{key}") for key in keys if "path" not in str(key)]
        return [each for found in inside for each in found]
    return [] if one == other else [where]


def check_as_alone(folder: Path, alone: Path, count: int) -> None:
    """All files of a run are those of the fit alone: adapters, optimizers, schedules, loops and random numbers."""
    files = sorted(alone.glob("*.ckpt"))
    assert len(files) == count == len(list(folder.glob("*.ckpt")))
    for file in files:
        read = [torch.load(each / file.name, weights_only=True) for each in (alone, folder)]
        for each in read:
            for name in [name for name in each["callbacks"] if "Checkpoint" in name]:
                del each["callbacks"][name]["dirpath"], each["callbacks"][name]["best_k_models"]
        assert read[0]["optimizer_states"][0]["state"]
        assert differences(*read) == []


@pytest.mark.parametrize(
    ("build", "varied", "options"),
    [
        (Rich, {"r": [1, 2, 4]}, {"accumulate_grad_batches": 2}),
        (lambda: Rich(manual=True), {"init": ["kaiming", "pissa"]}, {}),
        (Rich, {"lr_scale": [1, 10]}, {"val_check_interval": 2, "gradient_clip_val": 0.1}),
    ],
    ids=["accumulated", "manual", "validated often"],
)
def test_each_adapter_is_that_of_a_fit_alone_to_the_bit(tmp_path: Path, build: Any, varied: Any, options: Any) -> None:
    sweep = LoRASweep(**varied, keep=1, dropout=0.1, **HEAD)
    fit(tmp_path / "all", sweep, model=build(), **options)
    assert len(sweep.runs) == len(*varied.values())
    for name, arguments in sweep.runs.items():
        fit(tmp_path / name, LoRACallback(**arguments), model=build(), **options)
        check_as_alone(tmp_path / "all" / name, tmp_path / name, 6 if "val_check_interval" in options else 3)


class Pairs(Rich):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["a"], batch_idx)


class Held:
    """A batch that Lightning does not look into."""

    def __init__(self, batch: list[Tensor]) -> None:
        self.index, self.label = batch

    def to(self, device: Any) -> Any:
        return self


class Odd(Rich):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch["more"][0].index.add_(1).remainder_(20)
        batch["array"] += 1
        index = (batch["more"][0].index + torch.as_tensor(batch["array"])) % 20
        return super().training_step([index, batch["more"][0].label], batch_idx)


def odd(items: Any) -> Any:
    batch = torch.utils.data.default_collate(items)
    return {"array": batch[0].numpy().copy(), "more": (Held(batch), batch[1].clone())}


@pytest.mark.parametrize(
    ("build", "loaders"),
    [
        (Rich, lambda: (shuffled(num_workers=1, persistent_workers=True), data())),
        (Pairs, lambda: ({"a": shuffled(), "b": data()}, data())),
        (Rich, InData),
        (Odd, lambda: (shuffled(collate_fn=odd), data())),
    ],
    ids=["workers", "several", "data module", "objects"],
)
def test_data_is_loaded_once_and_as_alone(tmp_path: Path, build: Any, loaders: Any) -> None:
    InData.loaded = 0
    fit(tmp_path / "all", LoRASweep(r=[1, 2], keep=1), model=build(), loaders=loaders())
    assert InData.loaded <= 1
    for r in (1, 2):
        fit(tmp_path / f"r{r}", LoRACallback(r=r), model=build(), loaders=loaders())
        check_as_alone(tmp_path / "all" / f"r{r}", tmp_path / f"r{r}", 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_is_given_again_goes_on(tmp_path: Path, workers: int) -> None:
    def loaders() -> Any:
        kept = {"num_workers": 1, "persistent_workers": True} if workers else {}
        return DataLoader(data(20).dataset, 4, shuffle=True, **kept), data()  # type: ignore[arg-type]

    options = {"reload_dataloaders_every_n_epochs": 1}
    fit(tmp_path / "all", LoRASweep(r=[1, 2], keep=1), loaders=loaders(), **options)
    for r in (1, 2):
        fit(tmp_path / f"r{r}", LoRACallback(r=r), loaders=loaders(), **options)
        check_as_alone(tmp_path / "all" / f"r{r}", tmp_path / f"r{r}", 3)


class Prepared(Rich):
    """With data from setup, a callback of its own, and one loader that validates twice."""

    def setup(self, stage: str) -> None:
        self.parts = torch.utils.data.random_split(data(24).dataset, [16, 8])

    def train_dataloader(self) -> Any:
        return DataLoader(self.parts[0], 4, shuffle=True)

    def val_dataloader(self) -> Any:
        return [DataLoader(self.parts[1], 4)] * 2

    def configure_callbacks(self) -> Any:
        folder = Path(self.trainer.default_root_dir, "files")
        return [ModelCheckpoint(folder, "{step}", save_top_k=-1, monitor="val_loss/dataloader_idx_0")]

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", self.loss(batch) + 9 * self.current_epoch)


def test_data_of_setup_callbacks_of_the_module_and_several_validation_loaders(tmp_path: Path) -> None:
    models, kept = [Prepared(), Prepared()], []
    sweep = LoRASweep(r=[1, 2], monitor="val_loss/dataloader_idx_0", merge="best", keep=1)
    for callback, model in zip((sweep, None), models, strict=True):
        L.seed_everything(3, verbose=False)
        mine = callback or LoRACallback(**sweep.runs[sweep.results[0]["name"]])
        t = trainer(tmp_path / type(mine).__name__, [mine], max_epochs=2, enable_checkpointing=True)
        t.num_sanity_val_steps = 2
        t.fit(model)
        kept.append(Path(t.checkpoint_callback.best_model_path))  # type: ignore[union-attr]
    assert same(state(models[0]), state(models[1])) and kept[0].name == kept[1].name == "step=4.ckpt"
    check_as_alone(kept[0].parent, kept[1].parent, 2)


@pytest.mark.parametrize("merge", ["last", "best", False])
def test_the_trainer_and_the_module_end_as_after_a_fit_of_the_best_alone(tmp_path: Path, merge: Any) -> None:
    sweep = LoRASweep(r=[1, 2, 4], alpha=[4, 64], merge=merge, **HEAD)
    swept, judge = Rich(), ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    t = fit(tmp_path / "all", sweep, judge, model=swept)
    random = torch.get_rng_state()
    name = sweep.results[0]["name"]
    assert judge.best_model_path.startswith(str(tmp_path / "best" / name))
    alone = Rich()
    judge = ModelCheckpoint(tmp_path / "alone" / "best", monitor="val_loss")
    other = fit(tmp_path / "alone", LoRACallback(**sweep.runs[name]), judge, model=alone)
    assert same(state(swept), state(alone)) and is_plain(swept) is (merge is not False)
    assert swept.losses == alone.losses and torch.equal(random, torch.get_rng_state())
    assert differences(dict(t.callback_metrics), dict(other.callback_metrics)) == []
    assert (t.global_step, t.current_epoch) == (other.global_step, other.current_epoch) == (12, 3)
    for each, file in ((t, "swept.ckpt"), (other, "alone.ckpt")):
        each.save_checkpoint(tmp_path / file)
        each.test(each.lightning_module, data(), ckpt_path=judge.best_model_path, verbose=False)
    assert t.callback_metrics == other.callback_metrics
    files = [torch.load(tmp_path / file, weights_only=True) for file in ("swept.ckpt", "alone.ckpt")]
    assert differences(*[{k: v for k, v in each.items() if k not in ("callbacks", RANDOM)} for each in files]) == []
    resumed = trainer(tmp_path, [LoRACallback()], max_epochs=4)
    resumed.fit(Rich(), shuffled(), data(), ckpt_path=tmp_path / "swept.ckpt")
    assert resumed.global_step == 16


def test_the_better_half_goes_on_after_each_validation(tmp_path: Path) -> None:
    steps: list[str] = []
    modules: weakref.WeakSet[L.LightningModule] = weakref.WeakSet()
    left: dict[int, int] = {}

    class Count(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            steps.append(trainer.callbacks[0].run.name)  # type: ignore[attr-defined]
            modules.add(pl_module)

        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            gc.collect()
            left[trainer.current_epoch] = len(modules)

    sweep = LoRASweep(r=[1, 2], alpha=[1, 4, 16, 64])
    fit(tmp_path, sweep, Count(), max_epochs=4)
    assert [each["dropped"] for each in sweep.results] == [None, 3, 2, 2, 1, 1, 1, 1]
    assert len(steps) == 4 * (8 + 4 + 2 + 1)
    ends = [each["metrics"][-1] for each in sweep.results]
    assert ends[2:4] == sorted(ends[2:4]) and ends[4:] == sorted(ends[4:])
    best, second = sweep.results[:2]
    assert best["metrics"][2] <= second["metrics"][2]
    assert [*left.values()] == [8, 4, 2, 1]  # memory is free again
    assert steps[:32] == [name for name in sweep.runs for _ in range(4)]  # four batches go through all
    assert len(list((tmp_path / sweep.results[-1]["name"]).glob("*.ckpt"))) == 1


def test_eight_adapters_need_little_more_memory_than_one(tmp_path: Path) -> None:
    models: list[nn.Module] = []
    held: dict[int, int] = {}

    class Collect(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            models.append(pl_module)
            tensors = [each for one in models for each in (*one.parameters(), *one.buffers())]
            held.update({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors})

    class Loading(LitTiny):
        def setup(self, stage: str) -> None:
            """Such a hook may load weights: the copies share no memory until it has run."""

    for build in (LitTiny, Loading):
        models[:] = [build(256)]
        held.clear()
        base = sum(p.nbytes for p in models[0].parameters())
        t = trainer(
            tmp_path, [LoRASweep(r=[1, 2], alpha=[1, 2, 3, 4], target_modules=["q_proj"]), Collect()], max_epochs=1
        )
        t.fit(models[0], data(), data())  # type: ignore[arg-type]
        assert len(models) == 9
        assert base < sum(held.values()) < 1.15 * base


def test_a_run_that_stops_early_ends_and_the_others_go_on(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.callbacks[0].run.name == "r1"  # type: ignore[attr-defined]

    sweep = LoRASweep(r=[1, 2, 3], keep=1)
    fit(tmp_path, sweep, Stop())
    assert {each["r"]: len(each["metrics"]) for each in sweep.results} == {1: 1, 2: 3, 3: 3}
    ends = [each["metrics"][-1] for each in sweep.results]
    assert ends == sorted(ends)


def test_a_logger_has_a_name_for_each_adapter_and_a_table_shows_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = LoRASweep(r=[1, 2], init=["kaiming", "pissa"], monitor="val_acc", mode="max")
    fit(tmp_path, sweep, logger=CSVLogger(tmp_path, "", ""), log_every_n_steps=1)
    logged = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {f"{name}/val_loss" for name in sweep.runs} <= {*logged}
    assert {"epoch", "r1-init_pissa/train_loss_step"} <= {*logged} and "val_loss" not in logged
    accuracies = [each["metrics"][-1] for each in sweep.results if each["dropped"] == 1]
    assert accuracies == sorted(accuracies, reverse=True)
    shown = capsys.readouterr().out
    assert all(f"{name} " in shown for name in ("Adapter", "val_acc", "Dropped after", *sweep.runs))
    assert yaml.safe_load((tmp_path / "hparams.yaml").read_text())["lora/r"] == sweep.results[0]["r"]


def test_adapters_that_draw_other_numbers_need_loaders_with_their_own(tmp_path: Path) -> None:
    def own() -> Any:
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return shuffled(generator=generators[0]), DataLoader(data().dataset, 4, generator=generators[1])

    with pytest.warns(LoRAWarning, match="dropout0 gets the same data, and does not train exactly as it would alone"):
        fit(tmp_path / "warned", LoRASweep(dropout=[0.1, 0.0], keep=1))
    fit(tmp_path / "all", LoRASweep(dropout=[0.1, 0.0], keep=1), loaders=own())
    for p in (0.0, 0.1):
        fit(tmp_path / str(p), LoRACallback(dropout=p), loaders=own())
        check_as_alone(tmp_path / "all" / f"dropout{p:g}", tmp_path / str(p), 3)


def test_an_error_in_one_run_ends_all_before_the_first_batch(tmp_path: Path) -> None:
    model, seen = Rich(), []
    model.on_train_start = lambda: seen.append(1)  # type: ignore[method-assign]
    before = state(model)
    with pytest.raises(TargetError, match="q_porj"):
        fit(tmp_path, LoRASweep(target_modules=["all-linear", ["q_proj"], ["q_porj"]]), model=model)
    assert same(state(model), before) and find_record(model) is None and not list(tmp_path.glob("*/*.ckpt"))


class Leaves(Rich):
    last = 2

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == self.last and len(self.q_proj.lora_A) == 2 else None  # type: ignore[arg-type]


@pytest.mark.parametrize("last", [1, 3])
def test_a_run_that_leaves_an_epoch_early_is_named(tmp_path: Path, last: int) -> None:
    model = Leaves()
    model.last = last
    with pytest.raises(ConfigError, match=r"r2 takes other batches .* LoRASweep must use the same batches"):
        fit(tmp_path, LoRASweep(r=[1, 2, 3], keep=1), model=model, loaders=(data(20), data(20)))


def test_a_run_that_stops_in_an_epoch_validates_a_last_time_as_alone(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            trainer.should_stop = len(module.q_proj.lora_A) == 2 and trainer.global_step >= 7

    loaders = data(20), data(28)
    fit(tmp_path / "all", LoRASweep(r=[1, 2], keep=1), Stop(), loaders=loaders)
    for r, count in ((1, 3), (2, 2)):
        fit(tmp_path / f"r{r}", LoRACallback(r=r), Stop(), loaders=loaders)
        check_as_alone(tmp_path / "all" / f"r{r}", tmp_path / f"r{r}", count)


def test_an_error_in_training_ends_all_and_is_raised(tmp_path: Path) -> None:
    class Stops(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 and trainer.callbacks[0].run.name == "r2":  # type: ignore[attr-defined]
                raise StopError

    model = Rich()
    running = threading.active_count()
    with pytest.raises(StopError):
        fit(tmp_path, LoRASweep(r=[1, 2, 3]), Stops(), model=model)
    assert find_record(model) is None and threading.active_count() == running
    fit(tmp_path, lora(), model=model)


class Shared(L.Callback):
    """One for all runs."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class Noting(Rich):
    """It notes what happens in all places where code may, and begins anew in on_fit_start."""

    def __init__(self) -> None:
        super().__init__()
        self._steps, self.part = [0], nn.Identity()
        self.part.count = 0
        self.register_buffer("sum", torch.zeros(()), persistent=False)
        self.hparams.seen = 0

    def on_fit_start(self) -> None:
        self.losses = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self._steps.append(batch_idx)
        self.part.count += 1
        self.sum += loss.detach()
        self.accuracy(self(batch[0]), batch[1])
        self.hparams.seen = self.global_step
        self.last = loss.sin()  # with its graph
        return loss

    def noted(self) -> list[Any]:
        metric = {name: getattr(self.accuracy, name) for name in ("tp", "fp", "_update_count")}
        return [self.losses, self._steps, self.part.count, self.sum, dict(self.hparams), self.last.detach(), metric]


def test_what_the_modules_code_has_noted_is_the_bests(tmp_path: Path) -> None:
    models, sweep = [Noting(), Noting()], LoRASweep(r=[1, 2, 4])
    fit(tmp_path / "all", sweep, Shared(), model=models[0])
    fit(tmp_path / "alone", LoRACallback(**sweep.runs[sweep.results[0]["name"]]), model=models[1])
    assert models[1].part.count == 12 and differences(models[0].noted(), models[1].noted()) == []


@pytest.mark.parametrize(("where", "as_data"), [("training", False), ("training", True), ("end", False)])
def test_a_module_that_writes_frozen_weights_is_refused_by_name(tmp_path: Path, where: str, as_data: bool) -> None:
    class Teacher(Rich):
        def write(self) -> None:
            written.append(self.global_step)
            with torch.no_grad():
                (self.v_proj.weight.data if as_data else self.v_proj.weight).mul_(0.9)

        def on_train_batch_end(self, *_: Any) -> None:
            if where == "training":
                self.write()

        def on_train_epoch_end(self) -> None:
            if where == "end" and self.current_epoch == 2:
                self.write()

    written: list[int] = []
    sweep, model = LoRASweep(r=[1, 2], exclude_modules=["v_proj"]), Teacher()
    with pytest.raises(ConfigError, match=r"code of Teacher writes frozen weights: 'v_proj.weight'"):
        fit(tmp_path, sweep, model=model)
    assert find_record(model) is None and not model.losses and not sweep.results
    assert {*written} == {12 if where == "end" else 1}


def test_after_an_error_at_its_end_the_next_fit_begins_at_the_start(tmp_path: Path) -> None:
    class Stops(L.Callback):
        fails = True

        def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
            if Stops.fails and isinstance(trainer.callbacks[0], LoRASweep):
                raise StopError

    t, model = trainer(tmp_path, [LoRASweep(r=[1, 2]), Stops()], max_epochs=2), Rich()
    before = state(model)
    with pytest.raises(StopError):
        t.fit(model, data(), data())
    assert same(state(model), before) and t.limit_train_batches == t.limit_val_batches == 1.0 and t.global_step == 0
    Stops.fails = False
    t.fit(model, data(), data())
    assert t.global_step == 8 and not same(state(model), before)


@pytest.mark.parametrize("in_hook", [False, True])
def test_ctrl_c_ends_all(tmp_path: Path, in_hook: bool) -> None:
    class Interrupts(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3 and trainer.callbacks[0].run.name == "r2":  # type: ignore[attr-defined]
                if in_hook:
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)

    model, running = Rich(), threading.active_count()
    before = state(model)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path, LoRASweep(r=[1, 2, 3]), Interrupts(), model=model)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert same(state(model), before) and find_record(model) is None and threading.active_count() == running


@pytest.mark.parametrize("stops", [False, True])
def test_the_progress_bar_shows_the_best_one(tmp_path: Path, stops: bool) -> None:
    shown: list[tuple[int, str]] = []
    hooks: list[str] = []

    class Bar(ProgressBar):
        def on_train_start(self, *_: Any) -> None:
            hooks.append("start")

        def on_train_end(self, *_: Any) -> None:
            hooks.append("end")

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            assert self.trainer is trainer
            shown.append((trainer.current_epoch, trainer.callbacks[0].run.name))  # type: ignore[attr-defined]

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
            first = trainer.callbacks[0].run.name == "r1-alpha64"  # type: ignore[attr-defined]
            trainer.should_stop = stops and first

    sweep = LoRASweep(r=[1, 2], alpha=[64, 1, 4])
    fit(tmp_path, sweep, Bar(), Stop(), enable_progress_bar=True, max_epochs=4)
    expected = ["r1-alpha64"]
    for number in range(3):
        live = [each for each in sweep.results if len(each["metrics"]) > max(number, stops)]
        expected.append(min(live, key=lambda each: each["metrics"][number])["name"])
    assert shown == [(epoch, name) for epoch, name in enumerate(expected) for _ in range(4)]
    assert len({*expected}) > 1 and hooks[:3] == ["start", "end", *["end"] * stops, "start"][:3]


@pytest.mark.filterwarnings("error:.*exists and is not empty")
def test_nothing_is_said_twice(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class Estimates(Rich):
        def configure_optimizers(self) -> Any:
            assert self.trainer.estimated_stepping_batches == 12
            return super().configure_optimizers()

    t = fit(tmp_path, LoRASweep(r=[1, 2], keep=1), model=Estimates(), enable_model_summary=True)
    begun = "LoRASweep trains 2 adapters. The first table shows r1."
    for said in (begun, "Loading `train_dataloader`", "`Trainer.fit` stopped", "LoRACallback merged", "validation 2: "):
        assert caplog.text.count(said) == 1
    shown = capsys.readouterr().out
    assert shown.count("LoRA: Estimates trains") == 1 == shown.count("Total estimated model params size")
    assert any("ModelSummary" in type(each).__name__ for each in t.callbacks) and t.limit_val_batches == 1.0
    with caplog.at_level("INFO"):
        fit(tmp_path / "again", lora(), model=Estimates())
    assert caplog.text.count("`Trainer.fit` stopped") == 2


class Built(Rich):
    """Its layers are born in the fit."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.q_proj is None:
            self.q_proj = nn.Linear(8, 8)


def test_layers_that_are_born_in_the_fit_are_adapted(tmp_path: Path) -> None:
    fit(tmp_path / "all", LoRASweep(r=[1, 2], keep=1), model=Built())
    fit(tmp_path / "r2", LoRACallback(r=2), model=Built())
    check_as_alone(tmp_path / "all" / "r2", tmp_path / "r2", 3)


def test_adapters_of_a_quantised_base_are_as_alone(tmp_path: Path) -> None:
    torchao = pytest.importorskip("torchao.quantization")

    def build() -> Rich:
        model = Rich()
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda _, name: name == "q_proj")
        return model

    fit(tmp_path / "all", LoRASweep(r=[1, 2], keep=1, merge=False), model=build())
    fit(tmp_path / "r2", LoRACallback(r=2, merge=False), model=build())
    check_as_alone(tmp_path / "all" / "r2", tmp_path / "r2", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"r": 8}, "1 different adapter. Expected several"),
        ({"r": [8, 16, 16]}, "2 different adapters. Expected several, and none twice"),
        ({"r": [8, 16], "keep": 0}, "keep=0: val_loss needs"),
        ({"r": [8, 16], "mode": "least"}, "mode='least'"),
        ({"r": [8, 16], "monitor": "val_acc"}, "mode=None, keep=0.5: val_acc needs 'min' or 'max'"),
        ({"r": [8, 0]}, "r=0"),
        ({"ranks": [8, 16]}, "it is r here"),
        ({"foo": [8, 16]}, r"help\(LoRASweep\)"),
        ({"loraplus_lr_ratio": [1, 0]}, "loraplus_lr_ratio=0"),
        ({"target_modules": ["q_proj", "v_proj"]}, "a list of lists for target_modules"),
    ],
)
def test_arguments_are_checked_at_once(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoRASweep(**arguments)


def test_autocast_around_a_fit_is_refused(tmp_path: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast around fit"):
        fit(tmp_path, LoRASweep(r=[1, 2]))


def test_names_have_what_differs() -> None:
    sweep = LoRASweep(lr_scale=[1.0, 10.0], loraplus_lr_ratio=[4, 16], modules_to_save=[["head"]], r=[4])
    scales = {name: LoRACallback(**arguments).lr_scale for name, arguments in sweep.runs.items()}
    assert scales["lr_scale10-loraplus_lr_ratio16"] == {"A": 10, "B": 160} and len(scales) == 4
    assert all((each["r"], each["modules_to_save"]) == (4, ["head"]) for each in sweep.runs.values())


def test_adapters_whose_names_are_alike_are_numbered() -> None:
    sweep = LoRASweep(target_modules=[["q_proj"], "q_proj|v_proj", ["q_proj", "v_proj"]])
    names = [f"target_modules_q_proj{end}" for end in ("", "_v_proj", "_v_proj_3")]
    assert list(sweep.runs) == names and sweep.runs[names[2]]["target_modules"] == ["q_proj", "v_proj"]


def adapted() -> LitTiny:
    model = LitTiny()
    inject_adapters(model, lora().config)
    return model


@pytest.mark.parametrize(
    ("callbacks", "options", "message"),
    [
        ([lora()], {}, "2 LoRACallbacks.*LoRASweep takes the place of LoRACallback: leave the other out"),
        ([EMAWeightAveraging()], {}, "EMAWeightAveraging"),
        ([], {"overfit_batches": 1}, "overfit_batches"),
        ([], {"max_time": "00:01:00:00"}, "Timer"),
        ([], {"strategy": "ddp_fork", "devices": 2}, "DDPStrategy"),
        ([], {"limit_val_batches": 0}, "a fit without validation"),
        ([], {"model": adapted}, "a module with adapters"),
        ([], {"ckpt_path": "some.ckpt"}, "ckpt_path"),
        ([], {"train": [1, 2]}, "gave list|gave int"),
        ([], {"monitor": "val_loss2"}, "val_loss2' is not logged in validation. Found: 'val_loss'"),
    ],
)
def test_what_does_not_work_with_it_is_named_before_training(
    tmp_path: Path, callbacks: Any, options: Any, message: str
) -> None:
    model = options.pop("model", LitTiny)()
    model.on_train_batch_start = lambda *_: pytest.fail("it trains")
    train, path, monitor = (
        options.pop("train", data()),
        options.pop("ckpt_path", None),
        options.pop("monitor", "val_loss"),
    )
    t = trainer(tmp_path, [LoRASweep(r=[1, 2], monitor=monitor), *callbacks], **options)
    with pytest.raises(Exception, match=message) as raised:
        t.fit(model, train, data(), ckpt_path=path)
    assert raised.type is ConfigError or "strategy" in options  # the other process' error comes wrapped


class CLIModule(LitTiny):
    """LitTiny with its own data, and with the optimizer left to the CLI."""

    def train_dataloader(self) -> Any:
        return data()

    val_dataloader = train_dataloader
    configure_optimizers = LitTiny.__mro__[1].configure_optimizers  # LightningModule's: not overridden


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, about LightningCLI
@pytest.mark.filterwarnings("ignore:.*has been overridden after learning rate scheduler:UserWarning")
def test_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["main.py"])
    swept = {
        "r": [1, 2],
        "target_modules": [["q_proj"], ["q_proj", "v_proj"]],
        "keep": 1.0,
        "modules_to_save": ["head"],
    }
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "LoRASweep_logs")}}
    alone = {"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["head"]}
    for name, options in (("LoRASweep", swept), ("LoRACallback", alone)):
        files = {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(tmp_path / name), "filename": "end"}}
        quiet = {"accelerator": "cpu", "max_epochs": 2, "default_root_dir": str(tmp_path / f"{name}_logs")}
        quiet |= {
            "logger": logger if name == "LoRASweep" else False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        config = {
            "trainer": {"callbacks": [{"class_path": f"lightning_lora.{name}", "init_args": options}, files], **quiet},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.05}},
            "lr_scheduler": {"class_path": "ExponentialLR", "init_args": {"gamma": 0.9}},
            "seed_everything": 3,
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        args = ["fit", f"--config={tmp_path / 'config.yaml'}"]
        LightningCLI(CLIModule, args=args)
    saved = [str(path.relative_to(tmp_path)) for path in tmp_path.glob("*_logs/**/config.yaml")]
    assert sorted(saved) == ["LoRACallback_logs/config.yaml", "LoRASweep_logs/lightning_logs/version_0/config.yaml"]
    names = {each.name for each in (tmp_path / "LoRASweep").iterdir()}
    both = "r2-target_modules_q_proj_v_proj"
    assert names == {f"r{r}-target_modules_{targets}" for r in (1, 2) for targets in ("q_proj", "q_proj_v_proj")}
    check_as_alone(tmp_path / "LoRASweep" / both, tmp_path / "LoRACallback", 1)

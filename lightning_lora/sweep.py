"""LoRASweep: several adapters, each in fits of its own, of which the better ones go on."""

import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.seed import isolate_rng
from rich.table import Table

from lightning_lora.callback import LoRACallback
from lightning_lora.errors import ConfigError, listed
from lightning_lora.model.inject import remove_adapters
from lightning_lora.model.record import find_record
from lightning_lora.printing import fitting_console
from lightning_lora.tensors.inplace import class_names
from lightning_lora.training.compatibility import callbacks_of
from lightning_lora.training.merging import returns_state_only

_LISTS = {"target_modules", "target_parameters", "exclude_modules", "modules_to_save", "trainable_token_indices"}


class LoRASweep:
    """Train several adapters, and keep the best.

    After each epoch with a validation, the better ones go on, from their files (successive halving). Each trains
    exactly as alone, to the bit, and at the end the module is merged as after a fit of the best one alone.

    Args:
        monitor: The metric that decides, logged in validation.
        mode: Whether ``"min"`` or ``"max"`` is best. It may be left out for a loss.
        keep: The share of the adapters that goes on. 1 keeps all to the end.
        directory: The folder for the file of each adapter. It is made.
        arguments: LoRACallback's, as values or lists of values (of lists, for ``target_modules`` and the like).

    Raises:
        ConfigError: an argument has an invalid value.

    Source:
        Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and Hyperparameter Optimization", figure 1.

    Example:
        >>> sweep = LoRASweep(r=[8, 16], alpha=[16, 32], dropout=0.1)
        >>> sweep
        LoRASweep(r=[8, 16], alpha=[16, 32], dropout=0.1)
        >>> list(sweep.runs)
        ['r8-alpha16', 'r8-alpha32', 'r16-alpha16', 'r16-alpha32']
    """

    runs: dict[str, dict[str, Any]]  # the arguments of each adapter, by its name
    results: list[dict[str, Any]]  # of the last run: name, arguments, metrics and the epoch of the drop, the best first

    def __init__(
        self,
        *,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] | None = None,
        keep: float = 0.5,
        directory: str | Path = "lora_sweep",
        **arguments: Any,
    ) -> None:
        mode = mode or ("min" if "loss" in monitor else None)
        if mode not in ("min", "max") or not 0 < keep <= 1:
            raise ConfigError(f"mode={mode!r}, keep={keep!r}: {monitor} needs 'min' or 'max', keep a share in (0, 1].")
        self.monitor, self.mode, self.keep, self.directory = monitor, mode, keep, Path(directory)
        self.runs, self.results, self._arguments = {}, [], arguments
        lists = {name: value for name, value in arguments.items() if isinstance(value, list)}
        for name in lists.keys() & _LISTS:  # one value of these is a list itself
            if not any(isinstance(each, list) for each in lists[name]):
                del lists[name]
        self._varied = [name for name in lists if len(lists[name]) > 1]
        for values in itertools.product(*lists.values()):
            chosen = dict(zip(lists, values, strict=True))
            name = "-".join(map(_named, self._varied, map(chosen.get, self._varied)))[:200]
            if arguments | chosen not in self.runs.values():
                self.runs[f"{name}_{len(self.runs) + 1}" if name in self.runs else name] = arguments | chosen
            LoRACallback(**arguments | chosen)  # checks them
        if len(self.runs) < max(2, math.prod(map(len, lists.values()))):
            raise ConfigError(
                f"LoRASweep got these adapters: {listed(self.runs)}. Expected several, and none twice: lists "
                "such as r=[8, 16], and a list of lists for target_modules and its like."
            )

    def __repr__(self) -> str:
        """Show the arguments of the adapters."""
        return f"LoRASweep({', '.join(f'{name}={value!r}' for name, value in self._arguments.items())})"

    def run(self, fit: Callable[[Any, str | None], object]) -> list[dict[str, Any]]:
        """Train all adapters, merge the best one, show a table, and return ``results``.

        Args:
            fit: A function of a callback, which has the adapter's name as its attribute ``run``, and of a
                ``ckpt_path`` or None. It makes a Trainer with the callback, and fits with the ``ckpt_path``: all
                epochs, as if it were alone. It is called several times for each adapter. The module may be the same
                in all calls, or a new one with the same weights.

        Raises:
            ConfigError: ``fit`` does not use what it gets, ``monitor`` is not logged, or is NaN for all adapters. No
                adapter is on the module then.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        runs = list(map(partial(_Run, self), self.runs))
        live, epoch = runs, 0
        while live:
            epoch += 1
            for run in live:
                run.go_on(fit, stops=len(live) > 1 and self.keep < 1)
            live = sorted((run for run in live if not run.has_ended), key=self._rank)
            kept = math.ceil(len(live) * self.keep)
            if live:
                rank_zero_info(f"LoRASweep, epoch {epoch}: {live[0].name} is best; {kept} of {len(live)} go on.")
            for run in live[kept:]:
                run.dropped = epoch
            live = live[:kept]
        runs.sort(key=self._rank)
        self.results = list(map(_Run.result, runs))
        has_best = not self._rank(runs[0])[0]
        try:
            if has_best:
                last = _Callback(runs[0], stops=False, merges=True)
                fit(last, str(runs[0].file))
                if last.module is None:
                    raise ConfigError(
                        "LoRASweep expects that fit fits in each call: the last one merges the best adapter, and did "
                        f"not. Its file is {runs[0].file}."
                    )
        finally:
            rank_zero_only(fitting_console().print)(self.table())
        if not has_best:
            raise ConfigError(
                f"{self.monitor} is NaN for all adapters: none is best, and none is merged. Their files are in "
                f"{self.directory}. Try a lower learning rate."
            )
        return self.results

    def _rank(self, run: "_Run") -> tuple[bool, float, float]:
        """Those with numbers first, then those that trained longest, then by the last metric."""
        value = run.metrics[-1] if run.metrics else math.nan
        return math.isnan(value), -(run.dropped or math.inf), value if self.mode == "min" else -value

    def table(self) -> Table:
        """Return a table of the adapters of the last run."""
        table = Table("Adapter", *self._varied, self.monitor, "Dropped after epoch", title="LoRASweep")
        for each in self.results:
            metrics = "  ".join(f"{value:.4g}" for value in each["metrics"])
            values = map(str, map(each.get, self._varied))
            table.add_row(each["name"], *values, metrics, str(each["dropped"] or ""))
        return table


class _Run:
    """One adapter, through all its fits."""

    def __init__(self, sweep: LoRASweep, name: str) -> None:
        self.name, self.sweep, self.arguments = name, sweep, sweep.runs[name]
        self.file = sweep.directory / f"{name}.ckpt"
        self.metrics: list[float] = []  # one of each validation
        self.dropped: int | None = None  # the epoch after which it ends
        self.has_ended = False
        self.epochs = 0  # that it has trained

    def result(self) -> dict[str, Any]:
        varied = {name: self.arguments[name] for name in self.sweep._varied}
        return {"name": self.name, **varied, "metrics": self.metrics, "dropped": self.dropped}

    def go_on(self, fit: Callable[[Any, str | None], object], *, stops: bool) -> None:
        """Train it to the end, or through the next epoch with a validation. Leave no adapter on the module."""
        callback, known = _Callback(self, stops=stops), len(self.metrics)
        with isolate_rng():  # each begins with the same random numbers, or with those in its file
            try:
                fit(callback, str(self.file) if self.epochs else None)
            finally:
                if callback.module is not None and find_record(callback.module):
                    remove_adapters(callback.module)
        if not self.metrics or (len(self.metrics) == known and not self.has_ended):
            raise ConfigError(
                "LoRASweep expects that fit makes a Trainer with the callback that it gets, and that it validates. No "
                "validation has run."
            )


class _Callback(LoRACallback):
    """LoRACallback for one fit of a run: it writes the run's file at the end, or merges what is in it."""

    def __init__(self, run: _Run, *, stops: bool, merges: bool = False) -> None:
        super().__init__(**run.arguments if merges else {**run.arguments, "merge": False})
        self.run, self.progress, self.stops, self.known = run.name, run, stops, len(run.metrics)
        self.module: LightningModule | None = None
        self.most: int | None = None  # epochs

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            super().setup(trainer, pl_module, stage)
            return
        kinds, record = set[str]().union(*map(class_names, callbacks_of(trainer))), find_record(pl_module)
        refused = {
            "strategies that fork or spawn their processes (use 'ddp')": returns_state_only(trainer),
            "a module with adapters (if merged, call unmerge_adapters(model); then remove_adapters(model))": record,
            "callbacks that average weights": kinds & {"WeightAveraging", "StochasticWeightAveraging"},
            "max_steps (use max_epochs)": trainer.max_steps != -1,
            "reload_dataloaders_every_n_epochs": trainer.reload_dataloaders_every_n_epochs,  # type: ignore[attr-defined]
        }
        if found := ", ".join(filter(refused.get, refused)):
            raise ConfigError(f"LoRASweep does not work with {found}.")
        self.module, self.most = pl_module, trainer.fit_loop.max_epochs
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.merge or self.progress.has_ended:  # it ended, perhaps before the last epoch
            trainer.fit_loop.max_epochs = self.progress.epochs

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        trainer.fit_loop.max_epochs = self.most

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.progress.epochs and not trainer.global_step:
            raise ConfigError(
                "LoRASweep.run expects that fit passes its second argument on: Trainer.fit(ckpt_path=...)."
            )
        super().on_train_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        found, monitor = trainer.callback_metrics, self.progress.sweep.monitor
        if monitor not in found:
            raise ConfigError(
                f"monitor={monitor!r} is not logged in validation. Found: {listed(found)}. "
                f"Log it in validation_step: self.log({monitor!r}, ...)."
            )
        self.progress.metrics.append(trainer.strategy.broadcast(float(found[monitor])))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stops and len(self.progress.metrics) > self.known:
            trainer.fit_loop.max_epochs = trainer.current_epoch + 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.progress.epochs = trainer.current_epoch
        self.progress.has_ended = trainer.current_epoch == self.most or trainer.should_stop or not self.stops
        trainer.fit_loop.max_epochs = self.most
        trainer.save_checkpoint(self.progress.file, weights_only=False)


def _named(argument: str, value: object) -> str:
    """An argument and its value as a short part of a name, also of a file: ``r8`` or ``init_pissa``."""
    between = "" if isinstance(value, int | float) and not isinstance(value, bool) else "_"
    return argument + between + re.sub(r"[^\w.+]+", "_", str(value).removesuffix(".0"))[:60].strip("_")

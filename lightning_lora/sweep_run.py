"""One adapter of a LoRASweep, through all its fits, and its callback in each of them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_lora.callback import LoRACallback
from lightning_lora.errors import ConfigError, listed
from lightning_lora.model.record import find_record
from lightning_lora.model.remove import remove_adapters
from lightning_lora.training.compatibility import kinds_of
from lightning_lora.training.returned_records import returns_state_only

FitFunction = Callable[[Any, str | None], object]
"""The user's function of a callback and a ``ckpt_path``."""


class Run:
    """One adapter, through all its fits."""

    def __init__(self, name: str, arguments: dict[str, Any], directory: Path, monitor: str) -> None:
        self.name = name
        self.arguments = arguments
        self.monitor = monitor
        self.file = directory / f"{name}.ckpt"
        self.metrics: list[float] = []  # one of each validation
        self.dropped: int | None = None  # the epoch after which it ends
        self.has_ended = False
        self.epochs = 0  # that it has trained

    def result(self, varied: Iterable[str]) -> dict[str, Any]:
        """Return what the sweep says of it."""
        arguments = {name: self.arguments[name] for name in varied}
        return {"name": self.name, **arguments, "metrics": self.metrics, "dropped": self.dropped}

    def go_on(self, fit: FitFunction, *, stops: bool) -> None:
        """Train it to the end, or through the next epoch with a validation. Leave no adapter on the module."""
        callback = _Callback(self, {**self.arguments, "merge": False}, stops=stops)
        with isolate_rng():  # each begins with the same random numbers, or with those in its file
            try:
                fit(callback, self._path_to_resume())
            finally:
                callback.leave_no_adapter()
        has_validated = len(self.metrics) > callback.validations_before
        if not self.metrics or not (has_validated or self.has_ended):
            raise ConfigError(
                "LoRASweep expects that fit makes a Trainer with the callback that it gets, and that it validates. No "
                "validation has run."
            )

    def _path_to_resume(self) -> str | None:
        """The file from which the next fit goes on, or None for the first fit."""
        return str(self.file) if self.epochs else None

    def merge(self, fit: FitFunction) -> bool:
        """Merge what is in its file into the module. Return False if no fit has run."""
        callback = _Callback(self, self.arguments, stops=False)
        fit(callback, str(self.file))
        return callback.module is not None


class _Callback(LoRACallback):
    """LoRACallback for one fit of a run: it writes the run's file at the end, or merges what is in it.

    A fit ends early where the Trainer's ``max_epochs`` is lower than the user's for a while.
    """

    def __init__(self, run: Run, arguments: dict[str, Any], *, stops: bool) -> None:
        super().__init__(**arguments)
        self.run = run.name  # for the user's ``fit``
        self.progress = run
        self.stops = stops
        self.validations_before = len(run.metrics)
        self.module: LightningModule | None = None
        self.max_epochs: int | None = None  # the user's

    def leave_no_adapter(self) -> None:
        """Take what the fit has left off the module, if it had one."""
        if self.module is not None and find_record(self.module):
            remove_adapters(self.module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_works_in_sweep(trainer, pl_module)
            self.module = pl_module
            self.max_epochs = trainer.fit_loop.max_epochs
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.merge or self.progress.has_ended:  # by Run.merge, or to the end: this fit ends at once
            _end_after(trainer, self.progress.epochs)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        _end_after(trainer, self.max_epochs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.progress.epochs and not trainer.global_step:
            raise ConfigError(
                "LoRASweep.run expects that fit passes its second argument on: Trainer.fit(ckpt_path=...)."
            )
        super().on_train_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        monitor = self.progress.monitor
        if monitor not in metrics:
            raise ConfigError(
                f"monitor={monitor!r} is not logged in validation. Found: {listed(metrics)}. "
                f"Log it in validation_step: self.log({monitor!r}, ...)."
            )
        value = float(metrics[monitor])
        self.progress.metrics.append(trainer.strategy.broadcast(value))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.stops and len(self.progress.metrics) > self.validations_before:
            _end_after(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        run = self.progress
        run.epochs = trainer.current_epoch
        run.has_ended = trainer.current_epoch == self.max_epochs or trainer.should_stop or not self.stops
        _end_after(trainer, self.max_epochs)  # as the file is to hold it
        trainer.save_checkpoint(run.file, weights_only=False)


def _end_after(trainer: Trainer, epochs: int | None) -> None:
    """Let a fit end after so many epochs."""
    trainer.fit_loop.max_epochs = epochs


def _check_works_in_sweep(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse what does not work with a sweep."""
    averages = kinds_of(trainer) & {"WeightAveraging", "StochasticWeightAveraging"}
    refused = {
        "strategies that fork or spawn their processes (use 'ddp')": returns_state_only(trainer),
        "a module with adapters (if merged, call unmerge_adapters(model); then remove_adapters(model))": (
            find_record(pl_module) is not None
        ),
        "callbacks that average weights": bool(averages),
        "max_steps (use max_epochs)": trainer.max_steps != -1,
        "reload_dataloaders_every_n_epochs": bool(trainer.reload_dataloaders_every_n_epochs),  # type: ignore[attr-defined]
    }
    found = [what for what, is_there in refused.items() if is_there]
    if found:
        raise ConfigError(f"LoRASweep does not work with {', '.join(found)}.")

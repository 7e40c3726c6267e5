"""One adapter of a LoRASweep, through all its fits, and its callbacks: one that trains it, and one that loads it."""

import math
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_lora.callback import LoRACallback
from lightning_lora.errors import ConfigError, listed
from lightning_lora.model.records import find_record
from lightning_lora.model.remove import remove_adapters
from lightning_lora.summary import summarize
from lightning_lora.training.compatibility import kinds_of
from lightning_lora.training.returned_records import returns_state_only

FitFunction = Callable[[Any, str | None], object]
"""The user's function of a callback and a ``ckpt_path``."""


class SweptAdapter:
    """One adapter of a sweep, through all its fits."""

    def __init__(
        self, name: str, arguments: dict[str, Any], directory: Path, monitor: str
    ) -> None:
        self.name = name
        self.arguments = arguments
        self.monitor = monitor
        # each fit writes it at its end, and the next one goes on from it
        self.file = directory / f"{name}.ckpt"
        self.metrics: list[float] = []  # the monitored value of each validation
        self.epochs_of_metrics: list[int] = []  # the epoch of each validation, from 1
        self.weights = 0  # how many train
        # the epoch after which the sweep has dropped it
        self.dropped: int | None = None
        self.has_ended = False  # whether it was trained to the end
        self.epochs = 0  # how many it has trained

    def result(self, varied: Iterable[str], mode: str) -> dict[str, Any]:
        """Return what the sweep says of it.

        Its name, those of its arguments that are varied, how many weights train, its
        metrics, the best of them, and when it was dropped.
        """
        arguments = {name: self.arguments[name] for name in varied}
        best, best_epoch = self._best_validation(mode)
        return {
            "name": self.name,
            **arguments,
            "weights": self.weights,
            "metrics": self.metrics,
            "best": best,
            "best_epoch": best_epoch,
            "dropped": self.dropped,
        }

    def _best_validation(self, mode: str) -> tuple[float, int | None]:
        """The best of its metrics, and the epoch. NaN and None, if all are NaN."""
        validations = list[tuple[float, int]]()
        for value, epoch in zip(self.metrics, self.epochs_of_metrics, strict=True):
            if not math.isnan(value):
                validations.append((value, epoch))
        if not validations:
            return math.nan, None
        pick = min if mode == "min" else max
        return pick(validations, key=itemgetter(0))

    def go_on(self, fit: FitFunction, *, to_next_validation: bool) -> None:
        """Train it further, in one fit. Leave no adapter on the module.

        With ``to_next_validation``, the fit ends with the next epoch that has a
        validation. Without it, the fit ends as the user's Trainer says. During the fit,
        the callback writes ``metrics``, ``epochs`` and ``has_ended``.
        """
        callback = _TrainingCallback(self, to_next_validation=to_next_validation)
        # so each adapter begins with the same random numbers, or with those in its file
        with isolate_rng():
            try:
                fit(callback, self._path_to_resume())
            finally:
                callback.leave_no_adapter()
        if callback.module is None:
            raise ConfigError(
                "LoRASweep expects that fit makes a Trainer with the callback that it "
                f"gets, and fits. No fit of {self.name} has used its callback."
            )
        # an adapter's last fit may end without another validation
        has_done_its_part = callback.has_validated() or self.has_ended
        if not self.metrics or not has_done_its_part:
            raise ConfigError(
                f"The fit of {self.name} has ended without a validation, and LoRASweep "
                "compares adapters in validation. Expected batches in val_dataloader, "
                "and epochs that end with a validation."
            )

    def check_goes_on(self, fit: FitFunction) -> None:
        """See that ``fit`` goes on from this adapter's file, in a fit that ends at once."""
        callback = _LoadingCallback(self, **{**self.arguments, "merge": False})
        with isolate_rng():
            try:
                fit(callback, str(self.file))
            finally:
                callback.leave_no_adapter()
        if callback.module is None:
            raise ConfigError(
                "LoRASweep expects that fit fits in each call: the second one goes on "
                f"from {self.file}, and did not."
            )

    def _path_to_resume(self) -> str | None:
        """The file from which the next fit goes on, or None for the first fit."""
        return str(self.file) if self.epochs else None

    def merge(self, fit: FitFunction) -> bool:
        """Merge what is in its file into the module.

        Return False if ``fit`` has run no fit.
        """
        callback = _LoadingCallback(self, **self.arguments)
        fit(callback, str(self.file))
        return callback.module is not None


class _CallbackOfSweep(LoRACallback):
    """LoRACallback for one fit of one adapter, which ends where the sweep says.

    It ends the fit by a lower ``max_epochs`` of the Trainer, and gives the user's back.
    """

    def __init__(self, adapter: SweptAdapter, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.run = adapter.name  # the user's ``fit`` may read it
        self.adapter = adapter
        self.module: LightningModule | None = None  # None until a fit has begun
        self.max_epochs: int | None = None  # the user's

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            _check_works_in_sweep(trainer, pl_module)
            _check_validates(trainer)
            self.module = pl_module
            self.max_epochs = trainer.fit_loop.max_epochs
        super().setup(trainer, pl_module, stage)

    def leave_no_adapter(self) -> None:
        """Take what the fit has left off the module, if it had one."""
        if self.module is not None and find_record(self.module):
            remove_adapters(self.module)


class _LoadingCallback(_CallbackOfSweep):
    """Loads the adapter's file, and merges what is in it, as its arguments say.

    No training begins: all epochs are over.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        _end_after(trainer, self.adapter.epochs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise _path_not_passed_on()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_end(trainer, pl_module)
        _end_after(trainer, self.max_epochs)


class _TrainingCallback(_CallbackOfSweep):
    """Trains the adapter, notes its metrics, and writes its file."""

    def __init__(self, adapter: SweptAdapter, *, to_next_validation: bool) -> None:
        super().__init__(adapter, **{**adapter.arguments, "merge": False})
        self._to_next_validation = to_next_validation
        self._validations_before = len(adapter.metrics)

    def has_validated(self) -> bool:
        """Whether a validation of this fit has ended."""
        return len(self.adapter.metrics) > self._validations_before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.adapter.epochs and not trainer.global_step:
            raise _path_not_passed_on()
        super().on_train_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        monitor = self.adapter.monitor
        if monitor not in metrics:
            raise ConfigError(
                f"monitor={monitor!r} is not logged in validation. Logged: "
                f"{listed(metrics, 10) or 'nothing'}. Give one of these, or log it in "
                f"validation_step: self.log({monitor!r}, ...)."
            )
        value = float(metrics[monitor])
        self.adapter.metrics.append(trainer.strategy.broadcast(value))
        self.adapter.epochs_of_metrics.append(trainer.current_epoch + 1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._to_next_validation and self.has_validated():
            _end_after(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        adapter = self.adapter
        adapter.weights = summarize(pl_module).trained
        adapter.epochs = trainer.current_epoch
        has_epochs_left = adapter.epochs != self.max_epochs
        goes_on = self._to_next_validation and has_epochs_left
        # should_stop: EarlyStopping has ended its training for good
        adapter.has_ended = trainer.should_stop or not goes_on
        # the file holds max_epochs too
        _end_after(trainer, self.max_epochs)
        trainer.save_checkpoint(adapter.file, weights_only=False)


def _end_after(trainer: Trainer, epochs: int | None) -> None:
    """Let a fit end after so many epochs."""
    trainer.fit_loop.max_epochs = epochs


def _path_not_passed_on() -> ConfigError:
    """The error of a fit that begins anew where it should go on."""
    return ConfigError(
        "LoRASweep.run expects that fit passes its second argument on: "
        "Trainer.fit(ckpt_path=...)."
    )


def _check_validates(trainer: Trainer) -> None:
    """Refuse a fit that has no validation."""
    reason = _reason_for_no_validation(trainer)
    if reason:
        raise ConfigError(
            f"LoRASweep compares adapters in validation, and this fit has none: {reason}. "
            "Expected a validation_step, a val_dataloader, and a validation in some "
            "epoch."
        )


def _reason_for_no_validation(trainer: Trainer) -> str:
    """Why no validation will run, as far as it is known before the fit. Empty if one will."""
    if trainer.limit_val_batches == 0:
        return "limit_val_batches=0"
    if not trainer.enable_validation:
        return "no validation_step, or no val_dataloader"
    every = trainer.check_val_every_n_epoch
    last = trainer.max_epochs
    if every and last and 0 < last < every:
        return f"check_val_every_n_epoch={every} and max_epochs={last}"
    return ""


def _check_works_in_sweep(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse what does not work with a sweep."""
    averages = kinds_of(trainer) & {"WeightAveraging", "StochasticWeightAveraging"}
    reloads_data = trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
    refused = {
        "strategies that fork or spawn their processes (use 'ddp')": returns_state_only(
            trainer
        ),
        "a module with adapters (if merged, call unmerge_adapters(model); then remove_adapters(model))": (
            find_record(pl_module) is not None
        ),
        "callbacks that average weights": bool(averages),
        "max_steps (use max_epochs)": trainer.max_steps != -1,
        "reload_dataloaders_every_n_epochs": bool(reloads_data),
    }
    found = [what for what, is_there in refused.items() if is_there]
    if found:
        raise ConfigError(f"LoRASweep does not work with {', '.join(found)}.")

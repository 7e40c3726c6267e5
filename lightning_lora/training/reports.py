"""How the adapters train, shown and logged: their learning rates, the arguments as hyperparameters, the metrics."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import fsspec
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_lora.base.fingerprints import Fingerprint
from lightning_lora.errors import listed, warn
from lightning_lora.model.view import view_of
from lightning_lora.private import CLI_CLASS, LOGS_HPARAMS
from lightning_lora.tensors.dicts import where
from lightning_lora.tensors.inplace import class_names
from lightning_lora.training.optimizers.peak_rates import peak_rates

Values = dict[str, Any]

# Rates


def shown_rates(model: LightningModule, optimizers: Iterable[Optimizer]) -> list[str]:
    """Return the adapters' learning rates as text.

    The module's are added if they are others.
    """
    rates = peak_rates(view_of(model), optimizers)
    shown = [_few(rates.of_adapters)]
    if rates.of_others and rates.of_others != rates.of_adapters:
        shown.append(f"the module's: {_few(rates.of_others)}")
    return shown


def _few(rates: list[float]) -> str:
    """One or two rates, or the range of more."""
    if len(rates) > 2:
        return f"{rates[0]:g} to {rates[-1]:g}"
    return " and ".join(f"{rate:g}" for rate in rates)


# Arguments


def log_arguments(trainer: Trainer, pl_module: LightningModule, **others: Any) -> None:
    """Log the arguments and a digest of the base as ``lora/...``."""
    view = view_of(pl_module)
    config = view.config
    values = {**config.to_dict(), **others}
    values["alpha"] = config.alpha or config.r  # None means r
    if view.adapter.fingerprints:
        values["base"] = _digest_of(view.adapter.fingerprints[0])
    named = {
        f"lora/{name}": _plain(value)
        for name, value in where(values, _is_given).items()
    }
    _log(trainer, _Report(named, _hyperparameters(trainer, pl_module)))


def _digest_of(fingerprint: Fingerprint) -> str:
    """A short digest of a base."""
    text = f"{fingerprint['layout']} {fingerprint['dtypes']} {fingerprint['digests']}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _is_given(value: object) -> bool:
    return value is not None


def _plain(value: Any) -> Any:
    """A value that every logger takes: lists and dicts become text."""
    if isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value)


def _hyperparameters(trainer: Trainer, pl_module: LightningModule) -> Values:
    """The hyperparameters that Lightning logs by itself."""
    sources: list[Any] = [pl_module, trainer.datamodule]  # type: ignore[attr-defined]  # set outside the class
    values: Values = {}
    for source in sources:
        if getattr(source, LOGS_HPARAMS, False):
            values.update(source.hparams_initial)
    values.pop(CLI_CLASS, None)
    return values


def log_values(trainer: Trainer, named: Values) -> None:
    """Add values to the hyperparameters of a fit, if the Trainer logs any."""
    _log(trainer, _Report(named, adds=True))


# What each logger gets


@dataclass(frozen=True)
class _Report:
    """Values by name, and the hyperparameters that Lightning logs by itself."""

    values: Values
    hyperparameters: Values = field(default_factory=dict)
    adds: bool = False  # whether the logger has got an earlier report of this fit


def _log(trainer: Trainer, report: _Report) -> None:
    """Log a report as hyperparameters, if the Trainer logs any."""
    # older versions of Lightning have no such option
    if not getattr(trainer, "enable_autolog_hparams", True):
        return
    for logger in trainer.loggers:
        _try_to_log(logger, report)


def _try_to_log(logger: Any, report: _Report) -> None:
    """Give a logger a report, or warn: what cannot be logged is no reason to end a fit."""
    try:
        _give(logger, report)
    except Exception as error:  # of any library
        warn(
            f"{type(logger).__name__} did not take {listed(report.values)} "
            f"({type(error).__name__}: {error}). The fit goes on without them there."
        )


def _give(logger: Any, report: _Report) -> None:
    """Give a logger a report, but not for ``hparams.yaml``.

    From there, Lightning would pass it to a module.
    """
    kinds = class_names(logger)
    if "CSVLogger" in kinds:
        _write_beside_csv(logger, report)
    elif "TensorBoardLogger" in kinds:
        # TensorBoard shows only the hyperparameters that it gets first: it gets all
        logger.log_hyperparams({**report.hyperparameters, **report.values})
        for name in report.values:
            logger.hparams.pop(name, None)
    else:
        logger.log_hyperparams(dict(report.values))


def _write_beside_csv(logger: Any, report: _Report) -> None:
    """Write values into ``lora.json`` beside the logger's files, which may be on another machine."""
    path = f"{logger.log_dir}/lora.json"
    values: Values = {}
    if report.adds:
        with fsspec.open(path) as file:
            values = json.load(file)
    values.update(report.values)
    with fsspec.open(path, "w") as file:  # makes its folder
        json.dump(values, file, indent=2)


# Metrics


def logged_metrics(model: LightningModule) -> dict[str, float]:
    """Return what the run of a module has logged last, as numbers: a checkpoint holds them.

    A module that came back from spawned processes has no Trainer. Then nothing is
    known.
    """
    metrics = dict[str, float]()
    try:
        trainer = model.trainer
    except RuntimeError:  # it is attached to none
        return metrics
    for name, value in trainer.callback_metrics.items():
        metrics[name] = float(value)
    return metrics

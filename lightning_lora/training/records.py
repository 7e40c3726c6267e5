"""Hyperparameters for a run's loggers: how its adapters are trained."""

import json
import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_lora.errors import LoRAWarning, listed
from lightning_lora.model.loading import base_number
from lightning_lora.model.remember import view_of

_PREFIX = "lora/"


def log_arguments(trainer: Trainer, pl_module: LightningModule, **others: Any) -> None:
    """Log the arguments and a digest of the base.

    Their names begin with ``lora/``. Call it in one process, after the base's fingerprint was taken. Nothing is logged
    with ``Trainer(enable_autolog_hparams=False)``.

    Args:
        trainer: The Trainer of the fit.
        pl_module: The adapted module.
        others: More values to log.

    Warns:
        LoRAWarning: a logger raised an error, for example because it has logged another value for a name before.
    """
    if not getattr(trainer, "enable_autolog_hparams", True):  # older versions of Lightning have no such option
        return
    record = view_of(pl_module).record
    values = {**record.config.to_dict(), **others}
    values["alpha"] = record.config.alpha or record.config.r
    if record.fingerprints:
        values["base"] = f"{base_number(record.fingerprints[0]):016x}"
    named = {_PREFIX + name: _plain(value) for name, value in values.items() if value is not None}
    for logger in trainer.loggers:
        shown = {**_own(trainer, pl_module), **named} if _shows_first(logger) else named
        try:
            logger.log_hyperparams(shown)
        except Exception as error:  # of any library; a record is no reason to end a fit
            warnings.warn(
                f"{type(logger).__name__} did not take {listed(named)} ({type(error).__name__}: {error}). The fit goes "
                "on without them there.",
                LoRAWarning,
                stacklevel=1,
            )


def _plain(value: Any) -> Any:
    """A value that every logger takes: lists and dicts become text."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _shows_first(logger: Any) -> bool:
    """Whether a logger shows only what it gets first, which is ours: Lightning logs the module's own right after."""
    return any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__)  # in both Lightning packages


def _own(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The hyperparameters that Lightning logs by itself."""
    sources: list[Any] = [pl_module, trainer.datamodule]  # type: ignore[attr-defined]  # set outside the class
    saved = [source.hparams_initial for source in sources if source is not None and source._log_hyperparams]
    return {name: value for each in saved for name, value in each.items() if name != "_class_path"}

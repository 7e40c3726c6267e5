"""Errors and warnings of this package: each error is a :class:`LoRAError`, each warning a :class:`LoRAWarning`."""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return a short list of quoted names: ``'a', 'b' and 1 more``."""
    return shortened(map(repr, names), most)


def shortened(texts: Iterable[str], most: int = 5) -> str:
    """Return the first of some texts, and the number of the others."""
    texts = list(texts)
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")


def pairs_of(originals: Mapping[str, str]) -> str:
    """Return copies with their originals: ``'a' of 'b', 'c' of 'd'``."""
    return ", ".join(f"{copy!r} of {original!r}" for copy, original in originals.items())


class LoRAError(Exception):
    """Base class of all errors of this package."""


class ConfigError(LoRAError, ValueError):
    """An argument has an invalid value."""


class TargetError(LoRAError, ValueError):
    """A pattern matches no layer, or an unsupported one."""


class AdapterStateError(LoRAError, RuntimeError):
    """The model is in the wrong state for this call, for example without adapters."""


class AdapterMismatchError(LoRAError, ValueError):
    """Adapters do not fit the model or the configuration."""


class BaseMismatchError(LoRAError, ValueError):
    """The base is not the one that the adapters, or a checkpoint, need."""


class AdapterFileError(LoRAError, ValueError):
    """A file of adapters, or a checkpoint, cannot be read or written."""


class ExportError(LoRAError, ValueError):
    """Another library cannot hold these adapters, or would compute something else."""


class OptimizerError(LoRAError, RuntimeError):
    """The optimizers miss trainable weights, or hold frozen ones."""


class StrategyError(LoRAError, RuntimeError):
    """The Trainer's strategy is not supported."""


class LoRAWarning(UserWarning):
    """Base class of all warnings of this package."""


class BestCheckpointWarning(LoRAWarning):
    """``merge="best"`` found no best checkpoint and merged the last adapters."""


class DeadAdapterWarning(LoRAWarning):
    """Adapters received no gradient before the first optimizer step."""


class FreshLayerWarning(LoRAWarning):
    """Layers look untrained, and would stay random."""


class MergePrecisionWarning(LoRAWarning):
    """Merging into half precision rounded away much of the update."""


def warn(message: str, category: type[LoRAWarning] = LoRAWarning, *, anew: bool = False) -> None:
    """Warn at the user's own line: once, or ``anew`` each time."""
    frame = last = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        last, frame = frame, frame.f_back
    found: Any = frame or last
    registry = {} if anew else found.f_globals.setdefault("__warningregistry__", {})
    file, module = found.f_code.co_filename, found.f_globals.get("__name__")
    warnings.warn_explicit(message, category, file, found.f_lineno, module, registry)


# Modules whose lines are not the user's. And of a warning whose file is Lightning's, Lightning does not show the class.
_INSIDE = (__name__.partition(".")[0], "contextlib", "torch", "lightning", "pytorch_lightning", "lightning_fabric")

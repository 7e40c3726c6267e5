"""Errors and warnings of this package, and how their messages list things.

Each error is a :class:`LoRAError`, each warning a :class:`LoRAWarning`.
"""

import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# Errors


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


# Warnings


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


def warn(
    message: str, category: type[LoRAWarning] = LoRAWarning, *, anew: bool = False
) -> None:
    """Warn at the user's own line: once, or ``anew`` each time."""
    frame = _frame_of_user()
    file = frame.f_code.co_filename
    module = frame.f_globals.get("__name__")
    shown_before: dict[Any, Any] = {}
    if not anew:
        # Python notes there what it has shown for that module
        shown_before = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(
        message, category, file, frame.f_lineno, module, shown_before
    )


# Packages whose lines are not the user's. (Where a warning's file is Lightning's,
# Lightning shows it without its class.)
_NOT_OF_USER = (
    __name__.partition(".")[0],
    "contextlib",
    "torch",
    "lightning",
    "pytorch_lightning",
    "lightning_fabric",
)


def _frame_of_user() -> Any:
    """The innermost frame in code of the user.

    In a thread without any, the outermost one.
    """
    frame: Any = inspect.currentframe()
    while _package_of(frame) in _NOT_OF_USER and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _package_of(frame: Any) -> str:
    """The package whose code a frame runs."""
    module: str = frame.f_globals.get("__name__", "")
    return module.partition(".")[0]


# Words that messages have in common


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return a short list of quoted names: ``'a', 'b' and 1 more``."""
    return shortened(map(repr, names), most)


def shortened(texts: Iterable[str], most: int = 5) -> str:
    """Return the first of some texts, and the number of the others."""
    texts = list(texts)
    shown = ", ".join(texts[:most])
    others = len(texts) - most
    return f"{shown} and {others} more" if others > 0 else shown


def misfits(names_by_fault: Mapping[str, Collection[str]]) -> str:
    """Return what does not fit: ``missing 'a' and unexpected 'b', 'c'``.

    Empty: all fits.
    """
    texts = [
        f"{fault} {listed(names)}" for fault, names in names_by_fault.items() if names
    ]
    return " and ".join(texts)


def counted(number: int, noun: str) -> str:
    """Return how many of these there are: ``1 layer``, ``2 layers``."""
    return f"1 {noun}" if number == 1 else f"{number} {noun}s"

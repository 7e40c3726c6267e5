"""Everything this package raises or warns about, as one tree.

Exceptions::

    LoRAError
    ├── ConfigError            an argument cannot mean anything (also a ValueError)
    ├── TargetError            a pattern matches nothing, or a layer that cannot be adapted (also a ValueError)
    ├── AdapterStateError      the model is not in the state the call needs
    ├── AdapterMismatchError   adapters that do not fit this model or this configuration
    ├── BaseMismatchError      adapters that were trained on another base model
    ├── AdapterFileError       a file that is truncated, foreign or tampered with
    ├── OptimizerError         an optimizer that would not train the adapters
    └── StrategyError          a Trainer strategy under which the guarantees do not hold

Warnings::

    LoRAWarning
    ├── BestCheckpointWarning  merge="best", and no best checkpoint was written
    ├── DeadAdapterWarning     adapters that no gradient reaches
    └── MergePrecisionWarning  a merge whose rounding takes much of the update away
"""

from collections.abc import Iterable


def listed(names: Iterable[str], most: int = 5) -> str:
    """Return names as an error shows them: quoted, and only so many.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        "'a', 'b' and 1 more"
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more


class LoRAError(Exception):
    """Base of every error that this package raises."""


class ConfigError(LoRAError, ValueError):
    """An argument is outside what it may be."""


class TargetError(LoRAError, ValueError):
    """A pattern matches no layer, or only layers that cannot be adapted."""


class AdapterStateError(LoRAError, RuntimeError):
    """The model is not in the state that the call needs, for example it has no adapters."""


class AdapterMismatchError(LoRAError, ValueError):
    """Adapters do not fit the model or the configuration they meet."""


class BaseMismatchError(LoRAError, ValueError):
    """Adapters meet another base model than the one they were trained on."""


class AdapterFileError(LoRAError, ValueError):
    """A file cannot be read as what it claims to be."""


class OptimizerError(LoRAError, RuntimeError):
    """The optimizers leave something untrained that should train."""


class StrategyError(LoRAError, RuntimeError):
    """The Trainer's strategy cannot keep what this package promises."""


class LoRAWarning(UserWarning):
    """Base of every warning that this package gives."""


class BestCheckpointWarning(LoRAWarning):
    """``merge="best"`` found no best checkpoint and merged the last adapters."""


class DeadAdapterWarning(LoRAWarning):
    """Adapters received no gradient by the first optimizer step."""


class MergePrecisionWarning(LoRAWarning):
    """Merging into half-precision weights rounded a large share of the update away."""
